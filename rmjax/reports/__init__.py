"""Reports of runs, data sets and evaluations, as HTML, Markdown, JSON and in a terminal.

`runs`, `datasets` and `evaluations` each hold one kind of report. Their `page.py` builds the
`document.Document` of that kind and names the format of its `report.json`; `blocks.py` and
`*_blocks.py` build its sections. `writer.py` writes the files, `terminal.py` prints.
"""
