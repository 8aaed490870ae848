"""What ranks in tests need, imported once for all of them (see ``tests.helpers.ranks``)."""

import gc
import os

# Ranks compute on the CPU, also next to a GPU, which NCCL would not let several of them share.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import peft  # noqa: F401

import trainers.loop  # noqa: F401
from trainers.engine.deepspeed_engine import import_deepspeed

import_deepspeed()
# DeepSpeed collects garbage with every engine; without this it would go through all of the above.
gc.freeze()
