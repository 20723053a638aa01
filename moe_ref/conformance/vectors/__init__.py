"""Vectors: cases of every clause with their answers, in files that need no Python (docs/vectors.md).

- `cases`: which cases there are, and what each is for;
- `layers`, `contents`, `options`: the arrays of a case and the numbers beside them;
- `layout`: arrays to bytes and back; `tensors`: the same in safetensors;
- `folder`, `archive`: write all of them, whole or not at all;
- `reading`, `vector`: read them, refusing what is not of the form;
- `judging`: an executor on one vector, in the suite's own error bars.
"""
