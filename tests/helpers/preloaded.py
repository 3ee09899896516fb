"""What `helpers.forked` has in memory: what commands import, and no device.

Commands that define flags cannot be here themselves, since they would define them again.
"""
# ruff: noqa: F401

import rmjax.aot.search
import rmjax.convert
import rmjax.evaluate
import rmjax.extrapolate
import rmjax.report
import rmjax.train
import rmjax.training.features
import rmjax.training.probing.adamw
import rmjax.training.probing.ridge
