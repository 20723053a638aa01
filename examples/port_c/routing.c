#include "moe.h"
#include "vectors.h"

#include <math.h>

static double sigmoid(double v) { return v >= 0 ? 1 / (1 + exp(-v)) : exp(v) / (1 + exp(v)); }

/* sqrt(log(1 + exp(v))), with all its digits at both ends: exp(v / 2) far below 0 */
static double sqrtsoftplus(double v) { return v < -60 ? exp(v / 2) : sqrt(v > 0 ? v + log1p(exp(-v)) : log1p(exp(v))); }

int refused(const struct config *c, int E) {
    int wrong = 0;
    if (c->num_groups < 1 || E % c->num_groups) return WRONG_NUM_GROUPS;
    if (c->topk_groups < 1 || c->topk_groups > c->num_groups) return WRONG_TOPK_GROUPS;
    if (c->top_k < 1 || c->top_k > E || c->top_k > c->topk_groups * (E / c->num_groups)) wrong |= WRONG_TOP_K;
    if (c->num_groups > 1 && c->top2_sum && E / c->num_groups < 2) wrong |= WRONG_GROUP_SCORE;
    return wrong;
}

/* The `count` largest keys, of equal ones the lower index, in order (R2). taken: scratch [n] */
static void largest(const double *keys, int n, int count, int64_t *out, char *taken) {
    for (int i = 0; i < n; i++) taken[i] = 0;
    for (int k = 0; k < count; k++) {
        int best = -1;
        for (int i = 0; i < n; i++)
            if (!taken[i] && (best < 0 || keys[i] > keys[best])) best = i;
        taken[best] = 1;
        out[k] = best;
    }
}

static int broken_row(const struct config *c, int E, const double *logits) {
    int nothing = 1;
    for (int e = 0; e < E; e++) {
        if (isnan(logits[e]) || (logits[e] == INFINITY && c->scoring != SIGMOID)) return 1;
        if (logits[e] != -INFINITY) nothing = 0;
    }
    return nothing && (c->scoring == SOFTMAX || c->scoring == TOPK_SOFTMAX);
}

static void softmax(const double *logits, int n, double *p) {
    double most = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++) most = logits[i] > most ? logits[i] : most;
    for (int i = 0; i < n; i++) sum += p[i] = exp(logits[i] - most);
    for (int i = 0; i < n; i++) p[i] /= sum;
}

void choose(const struct config *c, int E, const double *logits, const double *bias, int64_t *ids) {
    double *keys = zeros(E), *p = zeros(E), *of_groups = zeros(E);
    int64_t *kept = keep(E, sizeof *kept);
    char *taken = keep(E, 1);
    int G = c->num_groups, size = E / G, computed = bias || G > 1;
    if (computed && c->scoring == SOFTMAX && !broken_row(c, E, logits)) softmax(logits, E, p);
    for (int e = 0; e < E; e++) {
        keys[e] = logits[e];
        if (computed) { /* the score of topk_softmax is the logit */
            if (!c->key_is_logit && c->scoring != TOPK_SOFTMAX)
                keys[e] = c->scoring == SOFTMAX ? p[e] : c->scoring == SIGMOID ? sigmoid(logits[e]) : sqrtsoftplus(logits[e]);
            if (bias) keys[e] += bias[e];
        }
        if (isnan(keys[e]) || isnan(logits[e]) || logits[e] == -INFINITY) keys[e] = -INFINITY;
    }
    if (G > 1) {
        for (int g = 0; g < G; g++) {
            double first = -INFINITY, second = -INFINITY;
            for (int e = g * size; e < (g + 1) * size; e++) {
                if (keys[e] > first) second = first, first = keys[e];
                else if (keys[e] > second) second = keys[e];
            }
            of_groups[g] = !c->top2_sum ? first : second == -INFINITY ? second : first + second;
        }
        largest(of_groups, G, c->topk_groups, kept, taken);
        for (int g = 0; g < G; g++) taken[g] = 0;
        for (int k = 0; k < c->topk_groups; k++) taken[kept[k]] = 1;
        for (int e = 0; e < E; e++)
            if (!taken[e / size]) keys[e] = -INFINITY;
    }
    largest(keys, E, c->top_k, ids, taken);
}

int undefined_row(const struct config *c, int E, const double *logits, const int64_t *ids) {
    if (broken_row(c, E, logits)) return 1;
    if (c->scoring != TOPK_SOFTMAX) return 0;
    for (int k = 0; k < c->top_k; k++)
        if (logits[ids[k]] != -INFINITY) return 0;
    return 1; /* a softmax over nothing but -inf */
}

/* Scores of the chosen experts, before renormalisation; p [E] is the softmax over all, if that is the scoring. */
static void scores(const struct config *c, int E, const double *logits, const int64_t *ids, double *s, double *p) {
    int K = c->top_k;
    if (c->scoring == SOFTMAX) softmax(logits, E, p);
    for (int k = 0; k < K; k++) {
        double v = logits[ids[k]];
        s[k] = c->scoring == SOFTMAX ? p[ids[k]] : c->scoring == SIGMOID ? sigmoid(v) : c->scoring == SQRTSOFTPLUS ? sqrtsoftplus(v) : v;
    }
    if (c->scoring == TOPK_SOFTMAX) softmax(s, K, s);
}

/* What renormalisation divides by (R5); *constant where its derivative is 0. */
static double divisor(const struct config *c, double sum, int *constant) {
    *constant = c->form_max && sum < c->eps;
    double d = !c->form_max ? sum + c->eps : *constant ? c->eps : sum;
    return d != 0 ? d : 1;  // R5
}

void weigh(const struct config *c, int E, const double *logits, const int64_t *ids, const double *scale, double *w) {
    double *p = zeros(E), sum = 0, by = 1;
    int constant, undefined = undefined_row(c, E, logits, ids);
    if (!undefined) scores(c, E, logits, ids, w, p);
    for (int k = 0; k < c->top_k; k++) sum += undefined ? 0 : w[k];
    if (c->renormalize) by = divisor(c, sum, &constant);
    for (int k = 0; k < c->top_k; k++) {
        w[k] = undefined ? NAN : w[k] / by * c->factor;
        if (scale) w[k] *= scale[ids[k]];
    }
}

void weigh_vjp(const struct config *c, int E, const double *logits, const int64_t *ids, const double *scale,
               const double *dw, double *d_logits, double *d_scale) {
    int K = c->top_k, constant = 1;
    double *p = zeros(E), *s = zeros(K), *ds = zeros(K), *unscaled = zeros(K), sum = 0, by = 1, dot = 0;
    if (undefined_row(c, E, logits, ids)) {
        for (int e = 0; e < E; e++) d_logits[e] = NAN;
        if (d_scale)
            for (int k = 0; k < K; k++) d_scale[ids[k]] = NAN;
        return;
    }
    weigh(c, E, logits, ids, NULL, unscaled);
    scores(c, E, logits, ids, s, p);
    for (int k = 0; k < K; k++) {
        ds[k] = dw[k] * (scale ? scale[ids[k]] : 1) * c->factor;
        if (d_scale) d_scale[ids[k]] += dw[k] * unscaled[k];
        sum += s[k];
    }
    if (c->renormalize) {
        by = divisor(c, sum, &constant);
        for (int k = 0; k < K && !constant; k++) dot += s[k] / by * ds[k];
        for (int k = 0; k < K; k++) ds[k] = (ds[k] - dot) / by;
    }
    if (c->scoring == SOFTMAX || c->scoring == TOPK_SOFTMAX) {
        double mean = 0;
        for (int k = 0; k < K; k++) mean += s[k] * ds[k];
        if (c->scoring == SOFTMAX)
            for (int e = 0; e < E; e++) d_logits[e] = -p[e] * mean;
        for (int k = 0; k < K; k++) d_logits[ids[k]] = s[k] * (ds[k] - mean);
        return;
    }
    for (int k = 0; k < K; k++) {
        double v = logits[ids[k]];
        double slope = c->scoring == SIGMOID ? sigmoid(v) * sigmoid(-v) : v == -INFINITY ? 0 : sigmoid(v) / (2 * sqrtsoftplus(v));
        d_logits[ids[k]] = ds[k] * slope;
    }
}

void group(int S, int E, const int64_t *ids, int64_t *order, int64_t *inverse, int64_t *offsets) {
    int row = 0;
    for (int e = 0; e <= E; e++) { /* E stands for empty slots: they come last, in slot order */
        offsets[e] = row;
        for (int i = 0; i < S; i++) {
            int empty = ids[i] < 0 || ids[i] >= E;
            if (e == E ? empty : ids[i] == e) inverse[i] = row, order[row++] = i;
        }
    }
}
