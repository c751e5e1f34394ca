"""`verl-aqn report`: show runs on one self-contained page. Start in `page.py`. Needs neither torch nor verl."""
