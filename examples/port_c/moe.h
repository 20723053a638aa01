/* The layer of docs/spec.md in double precision: routing, experts, combine, and all gradients. */
#ifndef MOE_H
#define MOE_H

#include <stdint.h>

enum { SOFTMAX, TOPK_SOFTMAX, SIGMOID, SQRTSOFTPLUS };
enum { SWIGLU, GEGLU, GEGLU_TANH, SILU, GELU, GELU_TANH, RELU2 };

struct config {
    int top_k, num_groups, topk_groups; /* top_k is -1 where routing was done elsewhere */
    int scoring, renormalize, form_max, top2_sum, key_is_logit, scale_input, activation, clamp_after, interleaved;
    double eps, factor, alpha, limit, up_offset, gate_softcap, up_softcap, norm_eps; /* NaN: no limit, no cap */
};

struct weights { /* row-major; NULL for what the layer does not have. Also used for gradients. */
    double *gate_up, *down, *gate_up_bias, *down_bias, *selection_bias, *expert_scale, *norm;
    double *gate_up_a, *gate_up_b, *down_a, *down_b;
    double gate_up_scaling, down_scaling;
};

struct sizes {
    int T, E, K, H, I, J, gate_up_rank, down_rank;
};

int gated(const struct config *c);

/* Routing (R1 to R5, R9) */
int refused(const struct config *c, int E); /* R8: what is wrong with the sizes, as a bit of `enum wrong`; 0 if nothing is */
enum wrong { WRONG_TOP_K = 1, WRONG_NUM_GROUPS = 2, WRONG_TOPK_GROUPS = 4, WRONG_GROUP_SCORE = 8 };
void choose(const struct config *c, int E, const double *logits, const double *bias, int64_t *ids);
int undefined_row(const struct config *c, int E, const double *logits, const int64_t *ids);
void weigh(const struct config *c, int E, const double *logits, const int64_t *ids, const double *scale, double *w);
void weigh_vjp(const struct config *c, int E, const double *logits, const int64_t *ids, const double *scale,
               const double *dw, double *d_logits, double *d_scale);

/* Grouping (G1): order and inverse [S], offsets [E + 1] */
void group(int S, int E, const int64_t *ids, int64_t *order, int64_t *inverse, int64_t *offsets);

/* Experts and combine (E1, E6, E8, C1, C3), forward and backward (D1 to D3); y and gradients begin as zeros.
   d_weights has NULL where no gradient is wanted. */
void layer(const struct config *c, const struct sizes *s, const struct weights *p, const double *x, const int64_t *ids,
           const double *w, const double *dy, double *y, double *dx, double *dw, struct weights *d);

#endif
