"""`rayclust explore`: a finished run as a page to work in, served on this machine.

`rows.py` finds rows by cluster on local disk, `explorer.py` answers questions about the run, `app.py` speaks HTTP and
guards who may ask; the page is plain HTML and JavaScript in `static/`.
"""
