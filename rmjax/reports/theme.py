"""The look of all reports: colours of plots and pages, light and dark.

Plots are drawn in the light colours. In a page each colour is a CSS variable with another value for
readers who prefer dark pages, so one drawing serves both.
"""

# After Okabe and Ito: colours that people with any colour vision can tell apart.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_SERIES_DARK = ("#58aee8", "#ff8b45", "#3ecf9f", "#e6a0c8", "#f3bb4a", "#9bd4f7")

INK = "#1b1f24"
MUTED = "#616a75"
LINE = "#dfe3e8"
PAPER = "#ffffff"

# Light colour, dark colour, of each CSS variable.
_COLOURS = {
    "ink": (INK, "#e8eaed"),
    "muted": (MUTED, "#9aa4b0"),
    "line": (LINE, "#323a44"),
    "paper": (PAPER, "#171b21"),
    "page": ("#f6f7f9", "#0e1116"),
    "soft": ("#f2f4f7", "#1f252d"),
    "shade": ("#1b1f2426", "#00000080"),
    "warn-line": ("#e69f00", "#f3bb4a"),
    "warn-back": ("#fff8e8", "#2b2415"),
} | {f"s{i}": pair for i, pair in enumerate(zip(SERIES, _SERIES_DARK))}

# What a plot's colours are called in a page.
VARIABLES = {
    _COLOURS[name][0]: f"var(--{name})"
    for name in ("ink", "muted", "line", "paper", *(f"s{i}" for i in range(len(SERIES))))
}


def _variables(which: int) -> str:
    return "".join(f"--{name}:{pair[which]};" for name, pair in _COLOURS.items())


STYLE = (
    f":root{{color-scheme:light dark;{_variables(0)}}}\n"
    f"@media (prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}\n"
    """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth;scroll-padding-top:1rem}
body{margin:0;background:var(--page);color:var(--ink);line-height:1.55;font-size:16px;
  font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans",sans-serif;
  overflow-wrap:anywhere}
main{max-width:1060px;margin:0 auto;padding:3rem 2rem 4rem}
header{margin-bottom:2rem}
h1{font-size:2.1rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 .4rem;font-weight:700}
.subtitle{font-size:1.1rem;color:var(--muted);margin:0 0 1.4rem;max-width:46rem}
h2{font-size:1.35rem;letter-spacing:-.01em;line-height:1.3;margin:3rem 0 .9rem;font-weight:650}
h3{font-size:1.05rem;line-height:1.35;margin:1.8rem 0 .6rem;font-weight:650}
p{margin:.6rem 0;max-width:46rem}
a{color:var(--s0);text-decoration:none}
a:hover{text-decoration:underline}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;margin:1.6rem 0 0;padding:.8rem 0;
  border-top:1px solid var(--line);border-bottom:1px solid var(--line);font-size:.9rem}
.card{background:var(--paper);border:1px solid var(--line);border-radius:10px}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr));
  gap:.7rem 1.6rem;margin:1rem 0;padding:1rem 1.2rem}
.facts div{min-width:0}
.facts dt{font-size:.78rem;color:var(--muted)}
.facts dd{margin:0;font-size:.94rem;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.headline{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,10.5rem),1fr));
  gap:.8rem;margin:1.2rem 0}
.headline div{padding:.9rem 1.1rem 1rem}
.headline dt{font-size:.82rem;color:var(--muted)}
.headline dd{margin:0}
.headline .number{font-size:1.75rem;font-weight:650;letter-spacing:-.02em;line-height:1.3;
  font-variant-numeric:tabular-nums}
.headline .detail{font-size:.8rem;color:var(--muted)}
figure{margin:1.2rem 0;min-width:0}
.caption{font-size:.92rem;font-weight:600;margin:0 0 .5rem;max-width:none}
.note{font-size:.83rem;color:var(--muted);margin:.55rem 0 0;max-width:52rem}
.scroll{overflow-x:auto}
.scroll.card{background:linear-gradient(90deg,transparent,var(--paper) 55%) 100%/2.4rem 100%
  no-repeat local,linear-gradient(90deg,transparent,var(--shade)) 100%/1rem 100% no-repeat,
  var(--paper)}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
.scroll.card{width:fit-content;max-width:100%}
.scroll.wide{width:auto}
table{border-collapse:collapse;min-width:min(26rem,calc(100vw - 2.2rem));
  overflow-wrap:normal;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.5rem .9rem;text-align:left;vertical-align:baseline;white-space:nowrap;
  border-bottom:1px solid var(--line)}
thead th{color:var(--muted);font-weight:500;font-size:.8rem;white-space:normal;line-height:1.3;
  vertical-align:bottom}
.wide table{min-width:100%}
tbody th{font-weight:500}
tr>:first-child{position:sticky;left:0;background:var(--paper)}
tbody tr:last-child>*{border-bottom:0}
tbody tr:hover>*{background:var(--soft)}
tr.strong>*{font-weight:650;background:var(--soft)}
.r{text-align:right}
td.l{white-space:normal;min-width:9rem;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,23rem),1fr));gap:1rem;
  margin:1.2rem 0}
.figures figure{margin:0;padding:1rem 1.1rem .9rem;display:flex;flex-direction:column}
.figures figure>svg{display:block;width:100%;height:auto;margin:0 auto auto}
.figures figcaption{font-size:.85rem;color:var(--muted);margin-top:.6rem;line-height:1.45}
svg text{font-family:inherit;font-variant-numeric:tabular-nums}
svg *{stroke-linejoin:round;stroke-linecap:butt}
.warning{border-left:4px solid var(--warn-line);background:var(--warn-back);padding:.7rem 1rem;
  border-radius:0 8px 8px 0;margin:1rem 0;font-size:.93rem}
.warning p{margin:0;max-width:none}
.example{padding:1rem 1.2rem 1.1rem;margin:1rem 0}
.example h4{margin:0;font-size:.95rem;font-weight:650}
.numbers{display:inline-flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.83rem;color:var(--muted);
  font-variant-numeric:tabular-nums}
.numbers b{color:var(--ink);font-weight:600}
.text{margin-top:.8rem;border-left:3px solid var(--line);padding-left:.9rem}
.text.chosen{border-color:var(--s0)}
.text.rejected{border-color:var(--s1)}
.label{display:flex;flex-wrap:wrap;gap:.1rem 1rem;align-items:baseline;font-size:.83rem}
.label>b{font-weight:650}
.chosen .label>b{color:var(--s0)}
.rejected .label>b{color:var(--s1)}
.said{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.9rem;max-height:19rem;overflow-y:auto;
  margin-top:.25rem}
details{margin:1rem 0;border-top:1px solid var(--line)}
details+details{margin-top:-1rem}
summary{cursor:pointer;padding:.75rem 0;font-weight:600;font-size:.95rem}
details[open]{padding-bottom:.8rem}
footer{margin-top:3.5rem;padding-top:1rem;border-top:1px solid var(--line);font-size:.8rem;
  color:var(--muted)}
@media (max-width:600px){
  main{padding:1.6rem 1rem 3rem}
  h1{font-size:1.6rem}
  .subtitle{font-size:1rem}
  h2{font-size:1.2rem;margin-top:2.3rem}
  .facts,.example{padding:.9rem 1rem}
  .headline{grid-template-columns:1fr 1fr;gap:.6rem}
  .headline div{padding:.7rem .85rem .8rem}
  .headline .number{font-size:1.4rem}
  .figures figure{padding:.8rem .7rem .8rem}
  th,td{padding:.45rem .65rem}
  tr>:first-child{white-space:normal;max-width:45vw;overflow-wrap:break-word}
}
@media print{
  body{background:none;font-size:11pt}
  main{max-width:none;padding:0}
  nav{display:none}
  figure,.example,.headline div{break-inside:avoid}
  h2,h3{break-after:avoid}
  .said{max-height:none}
  .scroll{overflow:visible}
}
"""
)
