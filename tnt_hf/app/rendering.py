"""Looks as HTML: figures, numbers and tables that read well on a phone, by keyboard and aloud."""

import base64
from collections.abc import Mapping
from html import escape
from io import BytesIO

from PIL import Image as PILImage

from ..results import device_facts
from .looking import BATCH_SIZE, SMALLER_IMAGE, Classifier, Look


UNTRAINED = (
    "This is a plain checkpoint, without trained scoring heads: its tokens are merged by their similarity alone, "
    "which needs no training."
)


SLOWER = "It computes less, but is not sooner here: on one image, a small model spends more on choosing than it gains."


def message(text: str, *, is_refusal: bool = False) -> str:
    """A sentence that screen readers speak when it appears."""
    kind = "alert" if is_refusal else "status"
    return f'<p role="{kind}" class="message {kind}">{escape(text)}</p>'


def look_page(classifier: Classifier, view: PILImage.Image, looks: Mapping[float, Look], chosen: float) -> str:
    """
    Cost, kept patches and answer at the last of `looks`, beside those at the first, the unpruned model; `chosen` is
    the budget that was asked for.
    """
    (full, *_), (reduction, pruned) = looks.values(), list(looks.items())[-1]
    hint = "" if classifier.is_trained else message(UNTRAINED)
    if reduction != chosen:
        hint += message(f"This model has no budget {chosen:g}: shown is the nearest, {reduction:g}.")
    if pruned.milliseconds > full.milliseconds:
        hint += message(SLOWER)
    return (
        f"{hint}<h2>Cost at budget {reduction:g}</h2>{_numbers(full, pruned)}<h2>Patches that are left</h2>"
        f"{_figures(classifier, view, pruned)}<h2>Answer</h2>"
        f"{_top5_table(full, pruned, classifier.model.config.id2label)}{_how_measured(classifier)}"
    )


def _numbers(full: Look, pruned: Look) -> str:
    less = f"{full.gflops / pruned.gflops:.2f}x less"
    tiles = [("Compute, GFLOPs", f"{full.gflops:.3g} → {pruned.gflops:.3g}", less)]
    for name, before, after in (
        ("Time alone, ms", full.milliseconds, pruned.milliseconds),
        (f"Time per image in a batch of {BATCH_SIZE}, ms", full.batch_milliseconds, pruned.batch_milliseconds),
    ):
        if before is not None:
            tiles.append((name, f"{_rounded(before)} → {_rounded(after)}", _ratio(before, after)))
    items = "".join(f"<div><dt>{name}</dt><dd>{change}</dd><dd>{ratio}</dd></div>" for name, change, ratio in tiles)
    return f'<dl class="numbers">{items}</dl>'


def _figures(classifier: Classifier, view: PILImage.Image, pruned: Look) -> str:
    num_patches = classifier.model.config.num_patches
    is_merging = classifier.model.config.merges
    unit = "tokens" if is_merging else "patches"
    shown = "patches that share a token have their mean colour" if is_merging else "dropped patches are tinted"
    figures = [_figure(view, "The image as the model sees it.", f"All {num_patches} patches")]
    for kept in pruned.kept:
        alt = f"After layer {kept.layer}, {kept.num_tokens} of {num_patches} {unit} are left: {shown}."
        figures.append(_figure(kept.picture, alt, f"Layer {kept.layer}: {kept.num_tokens} left"))
    text = f"After each pruned layer; {shown}." if pruned.kept else "Nothing is pruned at budget 1."
    return f'<p>{text}</p><div class="figures">{"".join(figures)}</div>'


def _how_measured(classifier: Classifier) -> str:
    facts = device_facts(classifier.model.device)
    return (
        '<p class="fine">Time: measured just now on this image; the fastest of a few runs after one to warm up, the '
        f"budgets in turn. {escape(facts['device'])}, threads: {facts['num_threads']}. GFLOPs: multiply-accumulates "
        "as executed; papers count a few more, those of the patches in the last layer.</p>"
    )


def _top5_table(full: Look, pruned: Look, id2label: Mapping[int, str]) -> str:
    """The five most probable classes before and after pruning, in the order before."""
    labels = {label for look in (full, pruned) for label in _ranked(look)[:5]}
    rows = "".join(
        f'<tr><th scope="row">{_class_name(id2label, label)}</th>'
        + "".join(_bar(look.probabilities[label]) for look in (full, pruned))
        + "</tr>"
        for label in _ranked(full)
        if label in labels
    )
    head = '<tr><th scope="col">Class</th><th scope="col">Before</th><th scope="col">After</th></tr>'
    caption = "<caption>Top-5 before and after pruning</caption>"
    return f'<table class="answers">{caption}<thead>{head}</thead><tbody>{rows}</tbody></table>'


def comparison_table(classifier: Classifier, view: PILImage.Image, looks: Mapping[tuple[float, str], Look]) -> str:
    """A row for each budget and method: what is left at the end, the answer, the cost."""
    full, id2label = next(iter(looks.values())), classifier.model.config.id2label
    rows = []
    for (reduction, method), look in looks.items():
        picture, alt = view, "The image unpruned"
        if method == SMALLER_IMAGE:
            height, width = look.size
            picture = view.resize((width, height)).resize(view.size, PILImage.Resampling.NEAREST)
            alt = f"The image at {width}x{height} pixels"
        elif look.kept:
            picture, alt = look.kept[-1].picture, f"{look.kept[-1].num_tokens} left at budget {reduction:g}"
        name = f"{reduction:g}, {method}" if method else f"{reduction:g}"
        rows.append(_comparison_row(name, picture, alt, look, full, id2label))
    names = ["Budget", "Kept", "Top-1", "ms alone"]
    if full.batch_milliseconds is not None:
        names.append(f"ms in batch of {BATCH_SIZE}")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    caption = "<caption>The same image under several budgets, made smaller instead, and with Token Merging</caption>"
    return (
        f'<table class="comparison">{caption}<thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f"{_how_measured(classifier)}"
    )


def _comparison_row(
    name: str, picture: PILImage.Image, alt: str, look: Look, full: Look, id2label: Mapping[int, str]
) -> str:
    label = _ranked(look)[0]
    cells = [
        _image(picture, alt),
        f"{_class_name(id2label, label)}<br><small>{look.probabilities[label]:.1%}</small>",
        _time(full.milliseconds, look.milliseconds),
    ]
    if look.batch_milliseconds is not None:
        cells.append(_time(full.batch_milliseconds, look.batch_milliseconds))
    budget = f"{name}<br><small>{look.gflops:.3g} GFLOPs</small>"
    return f'<tr><th scope="row">{budget}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _time(before: float, after: float) -> str:
    return f"{_rounded(after)}<br><small>{_ratio(before, after)}</small>"


def _rounded(milliseconds: float) -> str:
    return f"{milliseconds:.{0 if milliseconds >= 100 else 1}f}"


def _ratio(before: float, after: float) -> str:
    if before == after:
        return "unpruned"
    return f"{before / after:.2f}x faster" if after < before else f"{after / before:.2f}x slower"


def _ranked(look: Look) -> list[int]:
    return sorted(range(len(look.probabilities)), key=lambda label: -look.probabilities[label])


def _class_name(id2label: Mapping[int, str], label: int) -> str:
    name = str(id2label[label])
    return escape(name if len(name) <= 40 else f"{name[:38].rstrip(' ,')}...")


def _bar(probability: float) -> str:
    return f'<td><span class="bar" style="width: {probability:.1%}"></span>{probability:.1%}</td>'


def _figure(picture: PILImage.Image, alt: str, caption: str) -> str:
    return f"<figure>{_image(picture, alt)}<figcaption>{caption}</figcaption></figure>"


def _image(picture: PILImage.Image, alt: str) -> str:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img src="{source}" alt="{escape(alt)}" width="{picture.width}" height="{picture.height}">'


__all__ = ["comparison_table", "look_page", "message"]
