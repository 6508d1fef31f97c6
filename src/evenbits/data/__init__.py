"""Readers of what a user brings: text, labelled sentences, arrays; and the calibration text that ships with evenbits.

text.py        text files and JSON lines -> Documents; texts + tokenizer -> blocks of token ids
labelled.py    tsv, csv and JSON lines of sentences with integer labels -> Labelled
arrays.py      npy, npz and safetensors of inputs with labels -> Arrays

Nothing is downloaded here and no model library is imported: a tokenizer is an object the caller hands in.
"""
