"""The nouns of the pipeline: small, typed, tested without DVC. No paths of their own, no params.yaml, no printed results."""

import sys

# bitsandbytes asks the Hub for native code at import when the package `kernels` is there: no network, no foreign code.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
