"""open_clip's own trainer on an architecture of its table or of a JSON file; run by train.py.

python -m benchmarks.train_open_clip ARCHITECTURE.json [open_clip_train's options]
"""

import sys
from pathlib import Path

import open_clip
from open_clip_train.main import main

if __name__ == "__main__":
    file = Path(sys.argv[1])
    open_clip.add_model_config(file)
    main(["--model", file.stem, *sys.argv[2:]])
