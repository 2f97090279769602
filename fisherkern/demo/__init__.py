"""The demo: what the Fisher information of a real language model says about a real text.

Run it with ``fisherkern demo``. Nothing here is imported by the rest of the package.
"""
