"""The command `tnt-hf`. It is no module of tnt_hf, which imports torch: the help is there at once."""

import sys


COMMANDS = {
    "train": "Train scoring heads, or adapt LayerNorms and biases, and evaluate the result under several budgets.",
    "evaluate": "Evaluate a model under several budgets.",
    "benchmark": "Measure time and accuracy of a model under several budgets, beside its unpruned self.",
    "choose": "Choose how a model spends each budget best, by a few images without labels.",
    "convert": "Convert a checkpoint of the authors, of DeiT or of timm.",
    "export": "Export a model at its budget to ONNX, also in int8.",
    "app": "Serve a page on which an image and a budget show what is kept.",
    "visualize": "Draw what a model keeps of images, and plot its accuracy.",
    "publish": "Verify a finished run and publish it on the Hub.",
    "collection": "Train, evaluate and publish every checkpoint of a list.",
}
HELP = "\n".join(
    [
        "usage: tnt-hf COMMAND [flags]",
        "",
        "Choose the compute budget of a vision transformer at every call.",
        "",
        *(f"  {name:10} {sentence}" for name, sentence in COMMANDS.items()),
        "",
        "tnt-hf COMMAND --help lists the flags of a command.",
        "python -m tnt_hf is the same, and so is accelerate launch -m tnt_hf, on several GPUs.",
        "The demo, on images and a network that come with the package: tnt-hf train merge --output_dir runs/demo",
    ]
)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(HELP)
        return
    if name not in COMMANDS:
        sys.exit(f"Error: The first argument must be one of {', '.join(COMMANDS)}, got {name}.")
    from tnt_hf.commands import run_command

    sys.argv = [f"tnt-hf {name}", *sys.argv[2:]]
    run_command(name)


if __name__ == "__main__":
    main()
