"""Stage 2: tune bins, alpha, saturation and layer weights against a cache. CPU only, no network, no torch.

reads    id/train, id/subtrain, id/val and ood/val of a cache
writes   X.study.log (every trial) and X.params.json (the best) beside X.zarr
never    reads a test split, runs the network, or counts a trial that did not finish
resumes  with the trials of the same study (same cache, same seed) until it has as many as asked for

    python stages/search.py cache/digits-digits_cnn.zarr
"""

import sys

from nacpipe.cli import main

main(["search", *sys.argv[1:]])
