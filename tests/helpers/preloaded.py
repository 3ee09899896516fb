"""What `helpers.forked` has in memory: every command's imports, and no device."""

import rmjax.aot.search
import rmjax.convert
import rmjax.evaluate
import rmjax.extrapolate
import rmjax.probe
import rmjax.report
import rmjax.train  # noqa: F401
