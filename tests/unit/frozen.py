"""Imported last by the process that others are forked from: the collector, which every training calls, need not walk through the libraries."""

import gc

gc.collect()
gc.freeze()
