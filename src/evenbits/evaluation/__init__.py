"""Measuring: what a model gets right, before and after, with an interval that says how sure that is.

result.py          Evaluation, the value every task returns
tasks.py           the table of tasks and evaluate(), which looks one up
perplexity.py      causal language models on text
classification.py  accuracy on sentences, images or any batches
intervals.py       Wilson and bootstrap intervals
running.py         what the tasks share: evaluation mode, device, logits

Imports nothing from transformers: models and tokenizers are handed in.
"""
