// Every schema of the compiled back ends. The implementations register themselves per device, in
// cpu/*_bindings.cpp and cuda/*_bindings.cpp.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fisherkern_native, m) {
#define FISHERKERN_VECTOR "Tensor? weights, Tensor? logsumexp, float temperature"
#define FISHERKERN_SCALAR "Tensor? mask, Tensor? logsumexp, float temperature"
  m.def("softmax_fisher_matvec(Tensor logits, Tensor v, " FISHERKERN_VECTOR ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_sqrt_matvec(Tensor logits, Tensor v, " FISHERKERN_VECTOR
        ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_sqrt_rmatvec(Tensor logits, Tensor v, " FISHERKERN_VECTOR
        ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_matvec_backward(Tensor logits, Tensor v, Tensor grad, " FISHERKERN_VECTOR
        ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_quadratic(Tensor logits, Tensor v, " FISHERKERN_SCALAR
        ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_diagonal(Tensor logits, " FISHERKERN_VECTOR ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_diagonal_sum(Tensor logits, " FISHERKERN_VECTOR ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_mean_probs(Tensor logits, " FISHERKERN_VECTOR ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_powers(Tensor logits, " FISHERKERN_VECTOR
        ", Tensor(a!) sums, Tensor(b!)? reference, Tensor(c!)? unit) -> ()");
  m.def("softmax_fisher_trace(Tensor logits, " FISHERKERN_SCALAR ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_stats(Tensor logits, " FISHERKERN_SCALAR ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_stats_backward(Tensor logits, Tensor stats, Tensor grad, Tensor? mask, "
        "float temperature, Tensor(a!) out) -> ()");
  m.def("softmax_fisher_gradient(Tensor logits, Tensor labels, " FISHERKERN_VECTOR
        ", Tensor(a!) out) -> ()");
  m.def("softmax_fisher_sample(Tensor logits, Tensor seed, " FISHERKERN_VECTOR
        ", Tensor(a!) labels, Tensor(b!) out) -> ()");
  m.def("softmax_fisher_panel(Tensor logits, Tensor reference, Tensor unit, Tensor? scale, "
        "float temperature, bool transposed, Tensor(a!) out) -> ()");
#define FISHERKERN_FACTOR                                                                     \
  "Tensor[] logits, Tensor reference, Tensor unit, Tensor? labels, Tensor? at_label, float "   \
  "temperature, Tensor? scale, "
  m.def("softmax_fisher_project(" FISHERKERN_FACTOR "Tensor y, bool ones, str precision, "
        "int workspace, Tensor(a!) out, Tensor(b!)? gram) -> ()");
  m.def("softmax_fisher_expand(" FISHERKERN_FACTOR "Tensor c, float alpha, Tensor? y, "
        "Tensor? y_scale, str precision, int workspace, Tensor(a!) out) -> ()");
#undef FISHERKERN_FACTOR
  m.def("covariance_update(Tensor x, Tensor? mask, Tensor? weights, Tensor alpha, float beta, "
        "bool bias, str precision, Tensor(a!) factor) -> ()");
  m.def("cross_update(Tensor x, Tensor g, Tensor? mask, Tensor? weights, Tensor alpha, float beta, "
        "bool bias, str form, str precision, Tensor(a!) factor) -> ()");
  m.def("mirror(Tensor(a!) factor) -> ()");
  // CUDA alone: the parts of the two updates around products of torch, see ops/_cuda_kernels.py
  m.def("covariance_pack(Tensor x, Tensor? mask, Tensor? weights, bool bias, bool squares, "
        "int first_token, Tensor(a!) panel) -> ()");
  m.def("factor_update(Tensor tile, Tensor alpha, float beta, int first_row, int first_column, "
        "bool lower, bool squares, Tensor(a!) factor) -> ()");
  // CPU alone: elsewhere the products of torch, see ops/_head_products.py
  m.def("head_logits(Tensor hidden, Tensor weight, Tensor? bias, float? softcap, Tensor(a!) out) "
        "-> ()");
  m.def("head_pull(Tensor rows, Tensor weight, Tensor(a!) out) -> ()");
  m.def("head_squares(Tensor rows, Tensor hidden, float beta, Tensor(a!) out) -> ()");
#undef FISHERKERN_VECTOR
#undef FISHERKERN_SCALAR
}
