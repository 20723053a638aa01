/* Checks the port on files of vectors, whose names are its arguments, and prints the result by clause. */
#include "fourbits.h"
#include "moe.h"
#include "vectors.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define TOLERANCE 1e-10 /* of the largest magnitude in an array, */
#define OF_A_BAR 1e-6   /* or of an element's error bar, where terms cancel (docs/vectors.md) */
#define CLAUSES 64

static char wrong[200];

static int fails(const char *what) {
    snprintf(wrong, sizeof wrong, "%s", what);
    return 0;
}

static struct config config_of(const struct file *f) {
    struct config c = {0};
#define WHOLE(field, name) c.field = (int)number(f, "config." name, 0)
#define REAL(field, name) c.field = number(f, "config." name, NAN)
    WHOLE(top_k, "top_k"), WHOLE(num_groups, "num_groups"), WHOLE(topk_groups, "topk_groups"), WHOLE(scoring, "scoring");
    WHOLE(renormalize, "renormalize"), WHOLE(form_max, "renormalize_form"), WHOLE(top2_sum, "group_score");
    WHOLE(key_is_logit, "selection_key"), WHOLE(scale_input, "scale_input"), WHOLE(activation, "activation");
    WHOLE(clamp_after, "clamp"), WHOLE(interleaved, "gate_up_layout");
    REAL(eps, "renormalize_eps"), REAL(factor, "routed_scaling_factor"), REAL(alpha, "alpha"), REAL(limit, "limit");
    REAL(up_offset, "up_offset"), REAL(gate_softcap, "gate_softcap"), REAL(up_softcap, "up_softcap");
    REAL(norm_eps, "post_expert_norm_eps");
    return c;
}

static double *input(const struct file *f, const char *name) { return doubles(f, find2(f, "in.", name)); }

/* A projection: dense, or decoded, which must equal the file's own numbers to the last bit */
static double *projection(const struct file *f, const char *name, uint64_t *dim, int *ok) {
    char in[64], out[64];
    snprintf(in, sizeof in, "in.%s", name);
    snprintf(out, sizeof out, "out.%s", name);
    const struct entry *dense = find(f, in), *packed = find(f, out);
    const struct entry *entry = dense ? dense : packed;
    memcpy(dim, entry->dim, 3 * sizeof *dim);
    if (dense) return doubles(f, dense);
    size_t count;
    float *numbers = decode(f, in, &count, NULL);
    double *wide = zeros(count);
    for (size_t i = 0; i < count; i++) wide[i] = numbers[i];
    *ok = count == elements(packed) && !memcmp(numbers, bytes(f, packed), 4 * count);
    return wide;
}

static int equal_integers(const struct file *f, const char *name, const int64_t *mine, size_t count) {
    const struct entry *entry = find(f, name);
    return entry && elements(entry) == count && !memcmp(integers(f, entry), mine, count * sizeof *mine);
}

static int one_equal(double mine, double exact, double slack) {
    if (isnan(exact) || isnan(mine)) return isnan(exact) && isnan(mine);
    return mine == exact || fabs(mine - exact) <= slack;
}

/* Rows that are left out (R4) are marked; `width` is what a mark covers. */
static int equal(const struct file *f, const char *name, const double *mine, const char *left_out) {
    const struct entry *entry = find(f, name);
    if (!entry || !mine) return 1;
    const double *exact = doubles(f, entry), *sd = doubles(f, find2(f, name, ".sd"));
    size_t count = elements(entry), rows = entry->rank ? (size_t)entry->dim[0] : 1;
    double size = 0;
    for (size_t i = 0; i < count; i++)
        if (isfinite(exact[i]) && fabs(exact[i]) > size) size = fabs(exact[i]);
    for (size_t i = 0; i < count; i++) {
        if (left_out && left_out[i / (count / rows)]) continue;
        int must_be_exact = sd && sd[i] == 0 && isfinite(exact[i]);
        if (must_be_exact ? mine[i] != exact[i] : !one_equal(mine[i], exact[i], fmax(TOLERANCE * size, sd ? OF_A_BAR * sd[i] : 0))) {
            snprintf(wrong, sizeof wrong, "%s[%zu] is %.17g, but must be %.17g", name, i, mine[i], exact[i]);
            return 0;
        }
    }
    return 1;
}

static int check_decode(const struct file *f) {
    size_t count;
    float *scales = NULL, *numbers = decode(f, "in.tensor", &count, &scales);
    const struct entry *exact = find(f, "out.tensor"), *absmax = find(f, "out.absmax");
    const double *theirs = doubles(f, exact);
    if (count != elements(exact)) return fails("another number of numbers");
    for (size_t i = 0; i < count; i++)
        if (isnan(theirs[i]) ? !isnan(numbers[i]) : memcmp(&numbers[i], bytes(f, exact) + 4 * i, 4)) {
            snprintf(wrong, sizeof wrong, "number %zu is %.9g, but must be %.9g", i, (double)numbers[i], theirs[i]);
            return 0;
        }
    if (absmax && memcmp(scales, bytes(f, absmax), (size_t)absmax->bytes)) return fails("out.absmax");
    return 1;
}

static int distinct(const int64_t *ids, int K, int E) {
    for (int k = 0; k < K; k++) {
        if (ids[k] < 0 || ids[k] >= E) return 0;
        for (int other = 0; other < k; other++)
            if (ids[k] == ids[other]) return 0;
    }
    return 1;
}

static int check_route(const struct file *f) {
    struct config c = config_of(f);
    const struct entry *entry = find(f, "in.router_logits");
    int T = (int)entry->dim[0], E = (int)entry->dim[1], K = c.top_k;
    double *logits = doubles(f, entry), *bias = input(f, "selection_bias"), *scale = input(f, "expert_scale"), *w = zeros(K);
    int64_t *ids = keep(K, sizeof *ids), *choices = integers(f, find(f, "out.choices")), *offsets = integers(f, find(f, "out.choice_offsets"));
    double *weights = doubles(f, find(f, "out.choice_weights"));
    for (int t = 0; t < T; t++) {
        choose(&c, E, logits + t * E, bias, ids);
        weigh(&c, E, logits + t * E, ids, scale, w);
        int found = 0;
        if (!distinct(ids, K, E)) return fails("ids that are not distinct and in [0, E)");
        if (offsets[t] == offsets[t + 1]) {
            for (int k = 0; k < K; k++)
                if (!isnan(w[k])) return fails("an undefined row has a weight");
            continue;
        }
        for (int64_t row = offsets[t]; row < offsets[t + 1]; row++)
            if (!memcmp(ids, choices + row * K, K * sizeof *ids)) {
                found = 1;
                for (int k = 0; k < K; k++)
                    if (!one_equal(w[k], weights[row * K + k], TOLERANCE * fabs(weights[row * K + k]))) return fails("a weight");
            }
        if (!found) return fails("a choice that is not right");
    }
    return 1;
}

static int check_refused(const struct file *f) {
    struct config c = config_of(f);
    const struct entry *logits = find(f, "in.router_logits"), *x = find(f, "in.x"), *first = find(f, "in.gate_up_proj"), *second = find(f, "in.down_proj");
    const struct entry *bias = find(f, "in.selection_bias"), *scale = find(f, "in.expert_scale");
    int E = (int)logits->dim[1], bits = refused(&c, E);
    const char *found = bits & WRONG_TOP_K ? "top_k" : bits & WRONG_NUM_GROUPS ? "num_groups" : bits & WRONG_TOPK_GROUPS ? "topk_groups" : bits ? "group_score" : "";
    if (second->dtype != first->dtype) found = "down_proj.dtype";
    else if (x->dtype != first->dtype) found = "x.dtype";
    else if (bias && bias->dim[0] != (uint64_t)E) found = "selection_bias.shape";
    else if (scale && scale->dim[0] != (uint64_t)E) found = "expert_scale.shape";
    return is_text(f, "out.argument", found) ? 1 : fails(*found ? found : "nothing was refused");
}

static struct weights like(const struct file *f, const struct weights *p, const struct sizes *s) {
    struct weights d = {0};
    size_t E = s->E, H = s->H, I = s->I, J = s->J, r = s->gate_up_rank, q = s->down_rank;
    if (find(f, "grad.gate_up_proj")) d.gate_up = zeros(E * J * H);
    if (find(f, "grad.down_proj")) d.down = zeros(E * H * I);
    if (p->gate_up_bias) d.gate_up_bias = zeros(E * J);
    if (p->down_bias) d.down_bias = zeros(E * H);
    if (p->gate_up_a) d.gate_up_a = zeros(E * r * H), d.gate_up_b = zeros(E * J * r);
    if (p->down_a) d.down_a = zeros(E * q * I), d.down_b = zeros(E * H * q);
    if (p->norm) d.norm = zeros(H);
    if (p->expert_scale) d.expert_scale = zeros(E);
    return d;
}

static int check_grouping(const struct file *f, int S, int E, const int64_t *ids) {
    int64_t *order = keep(S, 8), *inverse = keep(S, 8), *offsets = keep(E + 1, 8), *sizes = keep(E, 8);
    group(S, E, ids, order, inverse, offsets);
    for (int e = 0; e < E; e++) sizes[e] = offsets[e + 1] - offsets[e];
    return (equal_integers(f, "out.order", order, S) && equal_integers(f, "out.inverse", inverse, S) &&
            equal_integers(f, "out.group_sizes", sizes, E) && equal_integers(f, "out.group_offsets", offsets, E + 1)) ||
           fails("grouping");
}

static int check_layer(const struct file *f, int by_logits) {
    struct config c = config_of(f);
    struct weights p = {0};
    uint64_t dim[3];
    int ok = 1;
    p.gate_up = projection(f, "gate_up_proj", dim, &ok);
    struct sizes s = {.J = (int)dim[1]};
    if (ok) p.down = projection(f, "down_proj", dim, &ok);
    if (!ok) return fails("a decoded number");
    s.E = (int)dim[0], s.H = (int)dim[1], s.I = (int)dim[2];
    p.gate_up_bias = input(f, "gate_up_proj_bias"), p.down_bias = input(f, "down_proj_bias");
    p.selection_bias = input(f, "selection_bias"), p.expert_scale = input(f, "expert_scale"), p.norm = input(f, "post_expert_norm");
    p.gate_up_a = input(f, "gate_up_lora_a"), p.gate_up_b = input(f, "gate_up_lora_b");
    p.down_a = input(f, "down_lora_a"), p.down_b = input(f, "down_lora_b");
    p.gate_up_scaling = number(f, "in.gate_up_scaling", 1), p.down_scaling = number(f, "in.down_scaling", 1);
    if (p.gate_up_a) s.gate_up_rank = (int)find(f, "in.gate_up_lora_a")->dim[1];
    if (p.down_a) s.down_rank = (int)find(f, "in.down_lora_a")->dim[1];
    s.T = (int)find(f, "in.x")->dim[0];
    const struct entry *given = find(f, by_logits ? "out.topk_ids" : "in.topk_ids");
    s.K = (int)given->dim[1];
    int S = s.T * s.K;
    double *x = input(f, "x"), *dy = input(f, "dy"), *logits = input(f, "router_logits"), *w = input(f, "topk_weights");
    int64_t *theirs = integers(f, given), *ids = theirs;
    char *broken = keep(s.T, 1), *infinite = keep(s.T, 1), *experts = keep(s.E, 1);
    if (by_logits) {
        ids = keep(S, sizeof *ids);
        w = zeros(S);
        if (refused(&c, s.E)) return fails("sizes were refused");
        for (int t = 0; t < s.T; t++) {
            choose(&c, s.E, logits + t * s.E, p.selection_bias, ids + t * s.K);
            weigh(&c, s.E, logits + t * s.E, ids + t * s.K, p.expert_scale, w + t * s.K);
            broken[t] = (char)undefined_row(&c, s.E, logits + t * s.E, ids + t * s.K);
            if (!distinct(ids + t * s.K, s.K, s.E)) return fails("ids that are not distinct and in [0, E)");
            if (!broken[t] && memcmp(ids + t * s.K, theirs + t * s.K, s.K * sizeof *ids)) return fails("a choice");
        }
        if (!equal(f, "out.topk_weights", w, NULL)) return 0;
    }
    for (int t = 0; t < s.T; t++) {
        for (int i = 0; i < s.H; i++) {
            broken[t] |= !isfinite(x[t * s.H + i]);
            infinite[t] |= !!isinf(x[t * s.H + i]);
        }
        for (int k = t * s.K; broken[t] && k < (t + 1) * s.K; k++) {
            if (ids[k] >= 0 && ids[k] < s.E) experts[ids[k]] = 1;
            if (theirs[k] >= 0 && theirs[k] < s.E) experts[theirs[k]] = 1;
        }
    }
    if (!check_grouping(f, S, s.E, theirs)) return 0;
    struct weights d = like(f, &p, &s);
    double *y = zeros(s.T * s.H), *dx = zeros(s.T * s.H), *dw = zeros(S), *d_logits = zeros(s.T * s.E);
    layer(&c, &s, &p, x, ids, w, dy, y, dx, dw, &d);
    for (int t = 0; by_logits && t < s.T; t++)
        weigh_vjp(&c, s.E, logits + t * s.E, ids + t * s.K, p.expert_scale, dw + t * s.K, d_logits + t * s.E, d.expert_scale);
    int any = memchr(broken, 1, s.T) != NULL;
    return equal(f, "out.y", y, infinite) && equal(f, "grad.x", dx, broken) && equal(f, "grad.router_logits", d_logits, broken) &&
           equal(f, "grad.topk_weights", dw, broken) && equal(f, "grad.gate_up_proj", d.gate_up, experts) &&
           equal(f, "grad.down_proj", d.down, experts) && equal(f, "grad.gate_up_proj_bias", d.gate_up_bias, experts) &&
           equal(f, "grad.down_proj_bias", d.down_bias, experts) && equal(f, "grad.gate_up_lora_a", d.gate_up_a, experts) &&
           equal(f, "grad.gate_up_lora_b", d.gate_up_b, experts) && equal(f, "grad.down_lora_a", d.down_a, experts) &&
           equal(f, "grad.down_lora_b", d.down_b, experts) && equal(f, "grad.expert_scale", d.expert_scale, experts) &&
           (any || equal(f, "grad.post_expert_norm", d.norm, NULL));
}

static int check(const struct file *f) {
    if (is_text(f, "case.kind", "layer")) return check_layer(f, 1);
    if (is_text(f, "case.kind", "experts")) return check_layer(f, 0);
    if (is_text(f, "case.kind", "route")) return check_route(f);
    if (is_text(f, "case.kind", "decode")) return check_decode(f);
    if (is_text(f, "case.kind", "quantize")) return quantizes(f) || fails("other bytes or numbers");
    if (is_text(f, "case.kind", "refused")) return check_refused(f);
    return fails("an unknown kind");
}

int main(int count, char **paths) {
    static char names[CLAUSES][8];
    static int passed[CLAUSES], failed[CLAUSES];
    int clauses = 0, all_passed = 0, all_failed = 0;
    for (int i = 1; i < count; i++) {
        struct file file;
        int ok = load(&file, paths[i]) ? check(&file) : fails("is no file of vectors");
        if (!ok) printf("FAILED %s: %s\n", paths[i], wrong);
        ok ? all_passed++ : all_failed++;
        const struct entry *entry = find(&file, "case.clauses");
        char text[200] = "";
        if (entry && entry->bytes < sizeof text) memcpy(text, bytes(&file, entry), (size_t)entry->bytes);
        for (char *word = strtok(text, " "); word; word = strtok(NULL, " ")) {
            int place = 0;
            while (place < clauses && strcmp(names[place], word)) place++;
            if (place == CLAUSES) break;
            if (place == clauses) snprintf(names[clauses++], sizeof *names, "%.7s", word);
            ok ? passed[place]++ : failed[place]++;
        }
        unload(&file);
        release();
    }
    for (int i = 0; i < clauses; i++) printf("%-3s %3d passed, %d failed\n", names[i], passed[i], failed[i]);
    printf("%d passed, %d failed\n", all_passed, all_failed);
    return all_failed || !all_passed;
}
