/* Compile without contraction: a product and a sum are rounded one by one (Q3). */
#include "fourbits.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const float NF4[16] = {
    -1, -0.696192801f, -0.525073051f, -0.394917488f, -0.284441382f, -0.18477343f, -0.0910500363f, 0,
    0.0795802996f, 0.160930201f, 0.246112302f, 0.337915242f, 0.440709829f, 0.562617004f, 0.722956836f, 1,
};
static const float FP4[16] = {
    0, (float)(1.0 / 192), (float)(2.0 / 3), 1, (float)(1.0 / 3), 0.5f, (float)(1.0 / 6), 0.25f,
    0, (float)(-1.0 / 192), (float)(-2.0 / 3), -1, (float)(-1.0 / 3), -0.5f, (float)(-1.0 / 6), -0.25f,
};
static const double E2M1[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};

/* To nearest even in a format of `precision` bits, normal from 2**lowest, finite below 2**(highest + 1). */
static double rounded(double v, int precision, int lowest, int highest) {
    if (v == 0 || !isfinite(v)) return v;
    int exponent;
    frexp(v, &exponent);
    exponent = exponent < lowest + 1 ? lowest + 1 : exponent;
    double near = ldexp(nearbyint(ldexp(v, precision - exponent)), exponent - precision);
    near = near == 0 ? copysign(0, v) : near;
    return fabs(near) >= ldexp(1, highest + 1) ? copysign(INFINITY, v) : near;
}

static float in_dtype(double v, const struct file *file, const char *name) {
    char key[80];
    snprintf(key, sizeof key, "%s.dtype", name);
    if (is_text(file, key, "bfloat16")) return (float)rounded(v, 8, -126, 127);
    if (is_text(file, key, "float16")) return (float)rounded(v, 11, -14, 15);
    return (float)rounded(v, 24, -126, 127);
}

static double option(const struct file *file, const char *name, const char *what) {
    char key[80];
    snprintf(key, sizeof key, "%s.%s", name, what);
    return number(file, key, 0);
}

static int of_type(const struct file *file, const char *name, const char *type) {
    char key[80];
    snprintf(key, sizeof key, "%s.quant_type", name);
    return is_text(file, key, type);
}

static float f32(const unsigned char *data, size_t i) {
    float value;
    memcpy(&value, data + 4 * i, 4);
    return value;
}

/* The scale of each block of nf4 and fp4 (Q3, Q5) */
static float *scales_of(const struct file *file, const char *name) {
    const struct entry *absmax = find2(file, name, ".absmax"), *nested = find2(file, name, ".nested_absmax");
    const unsigned char *own = bytes(file, absmax), *nested_absmax = bytes(file, nested);
    const unsigned char *code = bytes(file, find2(file, name, ".nested_code"));
    const struct entry *offset = find2(file, name, ".nested_offset");
    size_t blocks = elements(absmax);
    float *out = keep(blocks, sizeof *out);
    for (size_t b = 0; b < blocks; b++) {
        if (!nested) {
            out[b] = f32(own, b);
            continue;
        }
        size_t segments = offset->rank ? elements(offset) : 1, each = blocks / segments, size = (size_t)option(file, name, "nested_blocksize");
        size_t segment = b / each, place = segment * ((each + size - 1) / size) + b % each / size;
        volatile float product = f32(code, own[b]) * f32(nested_absmax, place); /* rounded, then added */
        out[b] = product + f32(bytes(file, offset), segment);
    }
    return out;
}

float *decode(const struct file *file, const char *name, size_t *count, float **scales) {
    int mx = of_type(file, name, "mxfp4");
    const struct entry *shape = find2(file, name, ".shape");
    const int64_t *dim = integers(file, shape);
    size_t n = 1, rank = elements(shape);
    for (size_t i = 0; i < rank; i++) n *= (size_t)dim[i];
    float *stored = keep(n, sizeof *stored);
    if (mx) {
        const unsigned char *codes = bytes(file, find2(file, name, ".blocks")), *exponents = bytes(file, find2(file, name, ".scales"));
        for (size_t i = 0; i < n; i++) { /* the low nibble first */
            int q = i % 2 ? codes[i / 2] >> 4 : codes[i / 2] & 15;
            double value = copysign(E2M1[q & 7], q & 8 ? -1 : 1);
            stored[i] = exponents[i / 32] == 255 ? NAN : in_dtype(ldexp(value, exponents[i / 32] - 127), file, name);
        }
    } else {
        const unsigned char *codes = bytes(file, find2(file, name, ".packed"));
        const float *table = of_type(file, name, "nf4") ? NF4 : FP4;
        float *own = scales_of(file, name);
        size_t blocksize = (size_t)option(file, name, "blocksize");
        for (size_t i = 0; i < n; i++) { /* the high nibble first */
            volatile float product = table[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * own[i / blocksize];
            stored[i] = in_dtype(product, file, name);
        }
        if (scales) *scales = own;
    }
    *count = n;
    if (!option(file, name, "transposed") || rank < 2) return stored;
    float *read = keep(n, sizeof *read); /* the bytes hold the last two dimensions swapped */
    size_t rows = (size_t)dim[rank - 2], columns = (size_t)dim[rank - 1];
    for (size_t i = 0; i < n; i++) {
        size_t matrix = i / (rows * columns), r = i / columns % rows, c = i % columns;
        read[i] = stored[matrix * rows * columns + c * rows + r];
    }
    return read;
}

static int ascending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* 256 numbers: for each power of ten the middles of 1, 2, 4, ... even parts of [0.1, 1], both signs, 0 and 1 */
static void dynamic_code(float *code) {
    int n = 0;
    for (int bits = 0; bits < 7; bits++)
        for (int i = 0; i < 1 << bits; i++) {
            double low = 0.1 + 0.9 * i / (1 << bits), high = 0.1 + 0.9 * (i + 1) / (1 << bits);
            double middle = pow(10, bits - 6) * (low + high) / 2;
            code[n++] = (float)middle;
            code[n++] = (float)-middle;
        }
    code[n++] = 0;
    code[n++] = 1;
    qsort(code, 256, sizeof *code, ascending);
}

/* Codes of numbers in blocks: the number of midpoints strictly below picks one of `count` ascending numbers (Q4). */
static void nearest(const float *v, size_t n, size_t blocksize, const float *numbers, int count, float *absmax, int *codes) {
    for (size_t start = 0; start < n; start += blocksize) {
        size_t stop = start + blocksize < n ? start + blocksize : n;
        float most = 0;
        for (size_t i = start; i < stop; i++) most = fabsf(v[i]) > most ? fabsf(v[i]) : most;
        absmax[start / blocksize] = most;
        float inverse = 1 / (most < 1e-38f ? 1e-38f : most);
        for (size_t i = start; i < stop; i++) {
            volatile float scaled = v[i] * inverse;
            float s = scaled > 1 ? 1 : scaled < -1 ? -1 : scaled;
            codes[i] = 0;
            for (int m = 0; m + 1 < count; m++) {
                volatile float sum = numbers[m] + numbers[m + 1];
                codes[i] += sum / 2 < s;
            }
        }
    }
}

static int same(const struct file *file, const char *name, const void *mine, size_t size) {
    const struct entry *entry = find(file, name);
    return entry && entry->bytes == size && !memcmp(bytes(file, entry), mine, size);
}

static int quantizes_nf4(const struct file *file, const float *v, size_t n) {
    int nf4 = is_text(file, "in.quant_type", "nf4"), count = nf4 ? 16 : 15, *codes = keep(n, sizeof *codes);
    size_t blocksize = (size_t)number(file, "in.blocksize", 64), blocks = (n + blocksize - 1) / blocksize;
    float sorted[16], *absmax = keep(blocks, sizeof *absmax);
    int code_of[16];
    if (nf4) memcpy(sorted, NF4, sizeof NF4);
    else {
        memcpy(sorted, FP4, 8 * sizeof *FP4);
        memcpy(sorted + 8, FP4 + 9, 7 * sizeof *FP4);
        qsort(sorted, 15, sizeof *sorted, ascending);
    }
    for (int i = 0; i < count; i++)
        for (int q = 15; q >= 0; q--)
            if ((nf4 ? NF4 : FP4)[q] == sorted[i]) code_of[i] = q;
    nearest(v, n, blocksize, sorted, count, absmax, codes);
    unsigned char *packed = keep((n + 1) / 2, 1);
    for (size_t i = 0; i < n + n % 2; i++) /* a nibble that is left over holds the code of 0 */
        packed[i / 2] |= (unsigned char)((i < n ? code_of[codes[i]] : nf4 ? 7 : 0) << (i % 2 ? 0 : 4));
    if (!same(file, "out.tensor.packed", packed, (n + 1) / 2)) return 0;
    if (!number(file, "in.nested", 0)) return same(file, "out.tensor.absmax", absmax, 4 * blocks);
    double mean = 0;
    for (size_t b = 0; b < blocks; b++) mean += absmax[b];
    float offset = (float)(blocks ? mean / (double)blocks : 0), code[256], *nested = keep((blocks + 255) / 256, sizeof *nested);
    float *left = keep(blocks, sizeof *left);
    unsigned char *eight = keep(blocks, 1);
    for (size_t b = 0; b < blocks; b++) left[b] = absmax[b] - offset;
    dynamic_code(code);
    codes = keep(blocks, sizeof *codes);
    nearest(left, blocks, 256, code, 256, nested, codes);
    for (size_t b = 0; b < blocks; b++) eight[b] = (unsigned char)codes[b];
    return same(file, "out.tensor.absmax", eight, blocks) && same(file, "out.tensor.nested_offset", &offset, 4) &&
           same(file, "out.tensor.nested_code", code, 1024) &&
           same(file, "out.tensor.nested_absmax", nested, 4 * ((blocks + 255) / 256));
}

static int quantizes_mxfp4(const struct file *file, const float *v, size_t n) {
    unsigned char *blocks = keep(n / 2, 1), *scales = keep(n / 32, 1);
    for (size_t b = 0; b < n / 32; b++) {
        double most = 0;
        int exponent;
        for (size_t i = 0; i < 32; i++) most = fmax(most, fabs(v[32 * b + i]));
        frexp(most, &exponent); /* most = m 2**exponent, m from 1/2: divided by 2**(exponent - 3) it is from 4 to 8 */
        int scale = most == 0 || exponent - 3 < -127 ? -127 : exponent - 3;
        scales[b] = (unsigned char)(scale + 127);
        for (size_t i = 32 * b; i < 32 * b + 32; i++) {
            double size = ldexp(fabs(v[i]), -scale);
            int q = 0;
            for (int m = 0; m < 7; m++) { /* a tie takes the even code */
                double middle = (E2M1[m] + E2M1[m + 1]) / 2;
                q += m % 2 ? size >= middle : size > middle;
            }
            blocks[i / 2] |= (unsigned char)((q | (v[i] < 0 ? 8 : 0)) << (i % 2 ? 4 : 0));
        }
    }
    return same(file, "out.tensor.blocks", blocks, n / 2) && same(file, "out.tensor.scales", scales, n / 32);
}

int quantizes(const struct file *file) {
    const struct entry *entry = find(file, "in.values");
    const double *values = doubles(file, entry);
    size_t n = elements(entry), count;
    float *v = keep(n, sizeof *v);
    for (size_t i = 0; i < n; i++) v[i] = (float)values[i];
    if (!(is_text(file, "in.quant_type", "mxfp4") ? quantizes_mxfp4 : quantizes_nf4)(file, v, n)) return 0;
    float *decoded = decode(file, "out.tensor", &count, NULL);
    return count == n && same(file, "out.values", decoded, 4 * n);
}
