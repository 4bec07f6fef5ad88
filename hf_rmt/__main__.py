"""``python -m hf_rmt`` is ``hf-rmt``."""

from hf_rmt.cli import main

if __name__ == "__main__":
    main()
