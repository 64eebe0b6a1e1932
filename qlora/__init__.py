"""The library behind stages/ and tools/, in packages by which stages run them; docs/design.md says why. Typed, tested without DVC."""

import logging
import os
import sys
import warnings

# No library tells anyone that it was used.
for _name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ.setdefault(_name, "1")
# bitsandbytes asks the Hub for native code at import when the package `kernels` is there: no network, no foreign code.
# Its advice to install that package is then noise.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# PEFT 0.21.2 reads an attribute that transformers 5.23 renamed.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
