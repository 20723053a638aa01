/* Reads test vectors (docs/vectors.md): arrays by name, as doubles or whole numbers. */
#ifndef VECTORS_H
#define VECTORS_H

#include <stddef.h>
#include <stdint.h>

enum { FLOAT64, FLOAT32, BFLOAT16, FLOAT16, INT64, INT32, UINT8 };

struct entry {
    char name[64];
    uint32_t dtype, rank;
    uint64_t dim[4], offset, bytes;
};

struct file {
    unsigned char *data;
    size_t size;
    uint64_t count;
    struct entry *entry;
};

int load(struct file *file, const char *path); /* 0 if it is no file of vectors */
void unload(struct file *file);

const struct entry *find(const struct file *file, const char *name); /* NULL if there is none */
const struct entry *find2(const struct file *file, const char *name, const char *more); /* by name and more */
size_t elements(const struct entry *entry);

/* New arrays, which live until `release`. NULL for a NULL entry. */
double *doubles(const struct file *file, const struct entry *entry);
int64_t *integers(const struct file *file, const struct entry *entry);
const unsigned char *bytes(const struct file *file, const struct entry *entry);

double number(const struct file *file, const char *name, double missing);
int is_text(const struct file *file, const char *name, const char *text);

/* Zeroed memory until `release`. */
void *keep(size_t count, size_t size);
double *zeros(size_t count);
void release(void);

#endif
