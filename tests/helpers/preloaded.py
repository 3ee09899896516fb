"""What `helpers.forked` has in memory: what commands import, or soon would, and no device.

Commands that define flags cannot be here themselves, since they would define them again.
"""
# ruff: noqa: F401

import huggingface_hub
import scipy.optimize
import scipy.special
import scipy.stats

import rmjax.aot.search
import rmjax.convert
import rmjax.evaluate
import rmjax.extrapolate
import rmjax.report
import rmjax.train
import rmjax.training.features
import rmjax.training.probing.adamw
import rmjax.training.probing.ridge
