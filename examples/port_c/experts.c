#include "moe.h"
#include "vectors.h"

#include <math.h>

int gated(const struct config *c) { return c->activation <= GEGLU_TANH; }

static double sigmoid(double v) { return v >= 0 ? 1 / (1 + exp(-v)) : exp(v) / (1 + exp(v)); }

/* out [m] += scale * W [m, n] v, and its transpose */
static void times(const double *W, int m, int n, const double *v, double scale, double *out) {
    for (int i = 0; i < m; i++) {
        double sum = 0;
        for (int j = 0; j < n; j++) sum += W[i * n + j] * v[j];
        out[i] += scale * sum;
    }
}

static void transposed_times(const double *W, int m, int n, const double *v, double scale, double *out) {
    for (int j = 0; j < n; j++) {
        double sum = 0;
        for (int i = 0; i < m; i++) sum += W[i * n + j] * v[i];
        out[j] += scale * sum;
    }
}

static void add_outer(double *W, int m, int n, const double *a, const double *b, double scale) {
    for (int i = 0; W && i < m; i++)
        for (int j = 0; j < n; j++) W[i * n + j] += scale * a[i] * b[j];
}

/* act(g) and its slope, of all activations but squared ReLU (E1) */
static double act(const struct config *c, double g, double *slope) {
    if (c->activation == SWIGLU || c->activation == SILU) {
        double L = c->limit, v = g, inner = 1, cap = g, d_cap = 1;
        if (!isnan(L) && !c->clamp_after && g > L) v = L, inner = 0; /* at equality the derivative is 1 */
        double alpha = c->activation == SILU ? 1 : c->alpha, s = sigmoid(alpha * v);
        cap = v;
        if (!isnan(c->gate_softcap)) {
            double t = tanh(v / c->gate_softcap);
            cap = c->gate_softcap * t, d_cap = 1 - t * t;
        }
        double value = cap * s;
        *slope = inner * (d_cap * s + cap * alpha * s * sigmoid(-alpha * v));
        if (c->clamp_after && value > L) value = L, *slope = 0;
        return value;
    }
    if (c->activation == GEGLU || c->activation == GELU) {
        double phi = erfc(-g / sqrt(2)) / 2;
        *slope = phi + g * exp(-g * g / 2) / sqrt(2 * acos(-1));
        return g * phi;
    }
    double k = sqrt(2 / acos(-1)), t = tanh(k * (g + 0.044715 * g * g * g));
    *slope = (1 + t) / 2 + g / 2 * (1 - t * t) * k * (1 + 3 * 0.044715 * g * g);
    return g * (1 + t) / 2;
}

/* The up half, bounded and moved, and its slope */
static double up_half(const struct config *c, double u, double *slope) {
    *slope = 1;
    if (c->activation != SWIGLU) return u;
    if (!isnan(c->up_softcap)) {
        double t = tanh(u / c->up_softcap);
        *slope = 1 - t * t;
        u = c->up_softcap * t;
    } else if (!isnan(c->limit) && (u > c->limit || u < -c->limit)) {
        *slope = 0;
        u = u > 0 ? c->limit : -c->limit;
    }
    return u + c->up_offset;
}

/* h [I] of z [J]; if dh is given, dz [J] too */
static void activate(const struct config *c, int I, const double *z, double *h, const double *dh, double *dz) {
    for (int i = 0; i < I; i++) {
        if (c->activation == RELU2) {
            double v = z[i] < 0 ? 0 : z[i];
            h[i] = v * v;
            if (dh) dz[i] = dh[i] * 2 * v;
        } else if (!gated(c)) {
            double slope;
            h[i] = act(c, z[i], &slope);
            if (dh) dz[i] = dh[i] * slope;
        } else {
            int g = c->interleaved ? 2 * i : i, u = c->interleaved ? 2 * i + 1 : I + i;
            double slope, up_slope, a = act(c, z[g], &slope), up = up_half(c, z[u], &up_slope);
            h[i] = up * a;
            if (dh) dz[g] = dh[i] * up * slope, dz[u] = dh[i] * a * up_slope;
        }
    }
}

/* out [m] = W v + bias, with the adapter scaling * B (A v) of rank r; inner [r] gets A v (E1, E6) */
struct projection {
    const double *W, *bias, *a, *b;
    double *dW, *d_bias, *da, *db, scaling;
    int m, n, r;
};

static struct projection projection_of(const struct weights *p, struct weights *d, const struct sizes *s, int down, int e) {
    struct projection q = {0};
    size_t m = q.m = down ? s->H : s->J, n = q.n = down ? s->I : s->H, r = q.r = down ? s->down_rank : s->gate_up_rank;
#define OF(set, first, second, size) ((down ? set->second : set->first) ? (down ? set->second : set->first) + (size_t)e * (size) : NULL)
    q.W = OF(p, gate_up, down, m * n), q.dW = OF(d, gate_up, down, m * n);
    q.bias = OF(p, gate_up_bias, down_bias, m), q.d_bias = OF(d, gate_up_bias, down_bias, m);
    q.a = OF(p, gate_up_a, down_a, r * n), q.da = OF(d, gate_up_a, down_a, r * n);
    q.b = OF(p, gate_up_b, down_b, m * r), q.db = OF(d, gate_up_b, down_b, m * r);
#undef OF
    q.scaling = down ? p->down_scaling : p->gate_up_scaling;
    return q;
}

static void project(const struct projection *q, const double *v, double *inner, double *out) {
    for (int i = 0; i < q->m; i++) out[i] = q->bias ? q->bias[i] : 0;
    times(q->W, q->m, q->n, v, 1, out);
    if (!q->a) return;
    for (int i = 0; i < q->r; i++) inner[i] = 0;
    times(q->a, q->r, q->n, v, 1, inner);
    times(q->b, q->m, q->r, inner, q->scaling, out);
}

/* dv [n] of d_out [m]; gradients of the projection's own parts add up (D1) */
static void project_vjp(const struct projection *q, const double *v, const double *inner, const double *d_out, double *dv) {
    for (int j = 0; j < q->n; j++) dv[j] = 0;
    transposed_times(q->W, q->m, q->n, d_out, 1, dv);
    add_outer(q->dW, q->m, q->n, d_out, v, 1);
    for (int i = 0; q->d_bias && i < q->m; i++) q->d_bias[i] += d_out[i];
    if (!q->a) return;
    double *d_inner = zeros(q->r);
    transposed_times(q->b, q->m, q->r, d_out, q->scaling, d_inner);
    add_outer(q->db, q->m, q->r, d_out, inner, q->scaling);
    add_outer(q->da, q->r, q->n, d_inner, v, 1);
    transposed_times(q->a, q->r, q->n, d_inner, 1, dv);
}

static double norm_root(const struct config *c, const struct weights *p, int H, const double *o) {
    double sum = 0;
    for (int i = 0; i < H; i++) sum += p->norm[i] * o[i] * (p->norm[i] * o[i]);
    return 1 / sqrt(sum / H + c->norm_eps);
}

void layer(const struct config *c, const struct sizes *s, const struct weights *p, const double *x, const int64_t *ids,
           const double *w, const double *dy, double *y, double *dx, double *dw, struct weights *d) {
    int H = s->H, I = s->I, J = s->J;
    double *row = zeros(H), *z = zeros(J), *h = zeros(I), *o = zeros(H), *out = zeros(H), *d_o = zeros(H), *dh = zeros(I);
    double *dz = zeros(J), *d_row = zeros(H), *inner1 = zeros(s->gate_up_rank), *inner2 = zeros(s->down_rank);
    for (int slot = 0; slot < s->T * s->K; slot++) {
        const double *token = x + (size_t)(slot / s->K) * H, *up = dy + (size_t)(slot / s->K) * H;
        if (ids[slot] < 0 || ids[slot] >= s->E) continue; /* an empty slot (R7) */
        int e = (int)ids[slot];
        double weight = w[slot], late = c->scale_input ? 1 : weight, early = c->scale_input ? weight : 1, r = 1, sum = 0;
        struct projection first = projection_of(p, d, s, 0, e), second = projection_of(p, d, s, 1, e);
        for (int i = 0; i < H; i++) row[i] = early * token[i];
        project(&first, row, inner1, z);
        activate(c, I, z, h, NULL, NULL);
        project(&second, h, inner2, o);
        if (p->norm) r = norm_root(c, p, H, o); /* E8 */
        for (int i = 0; i < H; i++) {
            out[i] = p->norm ? p->norm[i] * o[i] * r : o[i];
            y[(size_t)(slot / s->K) * H + i] += late * out[i];
            d_o[i] = late * up[i];
            sum += up[i] * out[i];
        }
        if (!c->scale_input) dw[slot] = sum; /* dy is unweighted (D3) */
        if (p->norm) { /* dn = r (do' - o' mean(o' do')), do = gamma dn */
            double mean = 0;
            for (int i = 0; i < H; i++) mean += out[i] * d_o[i] / H;
            for (int i = 0; i < H; i++) {
                double dn = r * (d_o[i] - out[i] * mean);
                if (d->norm) d->norm[i] += o[i] * dn;
                d_o[i] = p->norm[i] * dn;
            }
        }
        project_vjp(&second, h, inner2, d_o, dh);
        activate(c, I, z, h, dh, dz);
        project_vjp(&first, row, inner1, dz, d_row);
        sum = 0;
        for (int i = 0; i < H; i++) {
            dx[(size_t)(slot / s->K) * H + i] += early * d_row[i];
            sum += d_row[i] * token[i];
        }
        if (c->scale_input) dw[slot] = sum;
    }
}
