#include "vectors.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(sizeof(struct entry) == 120, "an entry has 120 bytes");

static struct kept {
    struct kept *next;
} *kept;

void *keep(size_t count, size_t size) {
    size_t head = 16;
    char *memory = calloc(1, head + (count ? count : 1) * size);
    if (!memory) {
        fputs("no memory\n", stderr);
        exit(2);
    }
    ((struct kept *)(void *)memory)->next = kept;
    kept = (struct kept *)(void *)memory;
    return memory + head;
}

double *zeros(size_t count) { return keep(count, sizeof(double)); }

void release(void) {
    while (kept) {
        struct kept *next = kept->next;
        free(kept);
        kept = next;
    }
}

static const size_t SIZES[] = {8, 4, 2, 2, 8, 4, 1};

size_t elements(const struct entry *entry) {
    return (size_t)(entry->dim[0] * entry->dim[1] * entry->dim[2] * entry->dim[3]);
}

static int is_whole(struct file *file, const char *path) {
    FILE *stream = fopen(path, "rb");
    if (!stream) return 0;
    long size = fseek(stream, 0, SEEK_END) ? -1 : ftell(stream);
    rewind(stream);
    file->size = size > 0 ? (size_t)size : 0;
    file->data = malloc(file->size + 1);
    int whole = file->data && file->size >= 16 && fread(file->data, 1, file->size, stream) == file->size;
    fclose(stream);
    if (!whole || memcmp(file->data, "MOEREFV1", 8)) return 0;
    memcpy(&file->count, file->data + 8, 8);
    file->entry = (struct entry *)(void *)(file->data + 16);
    if (file->count > (file->size - 16) / sizeof(struct entry)) return 0;
    for (uint64_t i = 0; i < file->count; i++) {
        const struct entry *e = &file->entry[i];
        uint64_t total = 1;
        for (int d = 0; d < 4; d++) {
            if (e->dim[d] && total > file->size / e->dim[d]) return 0;
            total *= e->dim[d];
        }
        if (e->name[63] || e->dtype > UINT8 || e->rank > 4 || e->bytes != total * SIZES[e->dtype]) return 0;
        if (e->offset % 8 || e->offset > file->size || e->bytes > file->size - e->offset) return 0;
    }
    return 1;
}

int load(struct file *file, const char *path) {
    memset(file, 0, sizeof *file);
    int whole = is_whole(file, path);
    if (!whole) file->count = 0; /* nothing is found in it */
    return whole;
}

void unload(struct file *file) { free(file->data); }

const struct entry *find(const struct file *file, const char *name) {
    for (uint64_t i = 0; i < file->count; i++)
        if (!strcmp(file->entry[i].name, name)) return &file->entry[i];
    return NULL;
}

const struct entry *find2(const struct file *file, const char *name, const char *more) {
    char whole[128];
    snprintf(whole, sizeof whole, "%s%s", name, more);
    return find(file, whole);
}

const unsigned char *bytes(const struct file *file, const struct entry *entry) {
    return entry ? file->data + entry->offset : NULL;
}

static double of_half(uint16_t bits) {
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double sign = bits >> 15 ? -1 : 1;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24));
}

static double of_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

double *doubles(const struct file *file, const struct entry *entry) {
    if (!entry) return NULL;
    size_t count = elements(entry);
    double *out = zeros(count);
    const unsigned char *data = bytes(file, entry);
    for (size_t i = 0; i < count; i++) {
        float f;
        uint16_t h;
        switch (entry->dtype) {
        case FLOAT64: memcpy(&out[i], data + 8 * i, 8); break;
        case FLOAT32: memcpy(&f, data + 4 * i, 4); out[i] = f; break;
        case BFLOAT16: memcpy(&h, data + 2 * i, 2); out[i] = of_bfloat16(h); break;
        case FLOAT16: memcpy(&h, data + 2 * i, 2); out[i] = of_half(h); break;
        default: return NULL;
        }
    }
    return out;
}

int64_t *integers(const struct file *file, const struct entry *entry) {
    if (!entry) return NULL;
    size_t count = elements(entry);
    int64_t *out = keep(count, sizeof *out);
    const unsigned char *data = bytes(file, entry);
    for (size_t i = 0; i < count; i++) {
        int32_t small;
        switch (entry->dtype) {
        case INT64: memcpy(&out[i], data + 8 * i, 8); break;
        case INT32: memcpy(&small, data + 4 * i, 4); out[i] = small; break;
        case UINT8: out[i] = data[i]; break;
        default: return NULL;
        }
    }
    return out;
}

double number(const struct file *file, const char *name, double missing) {
    const struct entry *entry = find(file, name);
    if (!entry || elements(entry) != 1) return missing;
    return entry->dtype <= FLOAT16 ? doubles(file, entry)[0] : (double)integers(file, entry)[0];
}

int is_text(const struct file *file, const char *name, const char *text) {
    const struct entry *entry = find(file, name);
    return entry && entry->bytes == strlen(text) && !memcmp(bytes(file, entry), text, (size_t)entry->bytes);
}
