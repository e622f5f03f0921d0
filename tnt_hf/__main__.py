"""`python -m tnt_hf` is the command `tnt-hf`."""

from tnt_hf_cli import main


if __name__ == "__main__":
    main()
