"""The paper's tables and figures on your data, on one page, and what goes beyond the paper.

`rows` and `parts` say as data what is trained and what it is set beside; `run` trains and measures;
`gains` says what may be claimed; the figures are a module each; `page` puts it all together.
"""
