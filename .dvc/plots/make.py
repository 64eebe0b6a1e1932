"""Make page.html, in which `dvc plots` draws without a network: DVC's own page loads the same three scripts from one.

npm pack vega@5.20.2 vega-lite@5.2.0 vega-embed@6.18.2     # the versions that dvc_render names; unpack them, then
python .dvc/plots/make.py vega.min.js vega-lite.min.js vega-embed.min.js
"""

import sys
from pathlib import Path

POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval';
  style-src 'unsafe-inline'; img-src data:">"""
"""Vega compiles its expressions; nothing else may come in, nothing may go out."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<!-- Vega, Vega-Lite and Vega-Embed, BSD 3-Clause: licences in .dvc/plots/LICENSES.txt. Made by .dvc/plots/make.py. -->
%s
{refresh_tag}
<title>Plots</title>
%s
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem; }
body > div { display: inline-block; vertical-align: top; margin: 0 1.5rem 1.5rem 0; }
</style>
</head>
<body>
{plot_divs}
</body>
</html>
"""

scripts = []
for name in sys.argv[1:]:
    code = Path(name).read_text(encoding="utf-8")
    assert "</script" not in code.lower(), name
    assert not any(placeholder in code for placeholder in ("{plot_divs}", "{refresh_tag}", "{scripts}")), name
    lines = [line for line in code.splitlines() if not line.startswith("//# sourceMappingURL")]
    scripts.append("<script>" + "\n".join(lines) + "</script>")
Path(__file__).with_name("page.html").write_text(PAGE % (POLICY, "\n".join(scripts)), encoding="utf-8")
