"""The pass on a tiny model: against its dense features, in every architecture; stopped, killed and resumed."""

import os
import random
import signal
from dataclasses import replace

import pytest
import torch
from store_problem import Talk, expected

from fastsae import (
    BatchTopKSAE,
    FastsaeError,
    FusedJumpReLUSAE,
    FusedTopKSAE,
    UsageError,
)
from fastsae.data.activations import ResidualStream
from fastsae.data.sequencing import TokenBatch
from fastsae.data.sinks import SinkRule
from fastsae.data.special_tokens import SpecialTokens
from fastsae.evaluate.token_kinds import KINDS, TokenKinds
from fastsae.interpret import collect
from fastsae.interpret.collect import collect_examples
from fastsae.interpret.store import HEADER, ExampleStore
from fastsae.interrupt import Interrupted

