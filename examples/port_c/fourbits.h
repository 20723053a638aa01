/* Four bits, to the last bit (Q1 to Q5, M1). */
#ifndef FOURBITS_H
#define FOURBITS_H

#include "vectors.h"

/* The numbers of the tensor `name`, in the shape as it is read; scales gets those of its blocks if it is not NULL. */
float *decode(const struct file *file, const char *name, size_t *count, float **scales);

/* Whether quantising in.values gives the bytes of out.tensor. */
int quantizes(const struct file *file);

#endif
