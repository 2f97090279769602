"""The CUDA sources run on the host: see cuda_emulation.h for what that shows, build.py for how."""
