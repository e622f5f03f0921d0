"""Looks as HTML: figures, numbers and tables that read well on a phone, by keyboard and aloud."""

import base64
from collections.abc import Mapping
from html import escape
from io import BytesIO
from textwrap import shorten

from looking import Classifier, Look
from PIL import Image as PILImage

from tnt_hf.throughput import device_facts


UNTRAINED = (
    "This is a plain checkpoint, its scoring heads are not trained: tokens are merged by their similarity alone, "
    "not by relevance."
)
SLOWER = (
    "Choosing tokens takes longer here than it saves: for one image alone, the layers of a small model cost little. "
    "Larger models and batches gain."
)


def message(text: str, *, is_refusal: bool = False) -> str:
    """A sentence that screen readers speak when it appears."""
    kind = "alert" if is_refusal else "status"
    return f'<p role="{kind}" class="message {kind}">{escape(text)}</p>'


def look_page(classifier: Classifier, view: PILImage.Image, full: Look, pruned: Look) -> str:
    """Cost, kept patches and answer of one budget, beside those of the unpruned model."""
    hints = [] if classifier.is_trained else [UNTRAINED]
    if not pruned.kept:
        hints = ["This is the unpruned model: nothing is dropped. Choose a budget above 1."]
    elif pruned.milliseconds > full.milliseconds:
        hints.append(SLOWER)
    return (
        f"{''.join(map(message, hints))}<h2>Cost</h2>{_numbers(full, pruned)}<h2>Patches that are kept</h2>"
        f"{_figures(classifier, view, pruned)}<h2>Answer</h2>"
        f"{_top5_table(full, pruned, classifier.model.config.id2label)}{_how_measured(classifier)}"
    )


def _numbers(full: Look, pruned: Look) -> str:
    tiles = (
        ("Compute, GFLOPs", f"{full.gflops:.3g}", f"{pruned.gflops:.3g}", f"{full.gflops / pruned.gflops:.2f}x less"),
        ("Time, ms", f"{full.milliseconds:.1f}", f"{pruned.milliseconds:.1f}", _times_faster(full, pruned)),
    )
    items = "".join(
        f"<div><dt>{name}</dt><dd>{before} → {after}</dd><dd>{ratio}</dd></div>"
        for name, before, after, ratio in tiles
    )
    return f'<dl class="numbers">{items}</dl>'


def _figures(classifier: Classifier, view: PILImage.Image, pruned: Look) -> str:
    num_patches = classifier.model.config.num_patches
    gone = "merged into others" if classifier.model.config.token_reduction == "merge" else "dropped"
    figures = [_figure(view, "The image as the model sees it.", f"All {num_patches} patches")]
    for kept in pruned.kept:
        state = f"{len(kept.indices)} of {num_patches} patches"
        alt = f"After layer {kept.layer}, {state} are left. Those {gone} are dimmed."
        figures.append(_figure(kept.picture, alt, f"Layer {kept.layer}: {len(kept.indices)} left"))
    dimmed = f"<p>After each pruned layer, dimmed patches are {gone}.</p>" if pruned.kept else ""
    return f'{dimmed}<div class="figures">{"".join(figures)}</div>'


def _how_measured(classifier: Classifier) -> str:
    facts = device_facts(classifier.model.device)
    return (
        f'<p class="fine">Time: measured just now, this image alone, median of a few runs after one to warm up, the '
        f"budgets in turn; {escape(facts['device'])}, {facts['num_threads']} threads. GFLOPs: multiply-accumulates, "
        "counted as in papers.</p>"
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


def comparison_table(classifier: Classifier, view: PILImage.Image, looks: Mapping[str, Look]) -> str:
    """A row for each budget: what is left at the end, the answer, the cost."""
    full, id2label = next(iter(looks.values())), classifier.model.config.id2label
    rows = []
    for name, look in looks.items():
        picture, left = (look.kept[-1].picture, len(look.kept[-1].indices)) if look.kept else (view, None)
        alt = "The image unpruned" if left is None else f"{left} patches left at {name}"
        label = _ranked(look)[0]
        cells = (
            _image(picture, alt),
            f"{_class_name(id2label, label)}<br><small>{look.probabilities[label]:.1%}</small>",
            f"{look.gflops:.3g}",
            f"{look.milliseconds:.1f}{'<br><small>' + _times_faster(full, look) + '</small>' if look.kept else ''}",
        )
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    names = ("Budget", "Kept", "Top-1", "GFLOPs", "ms")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    caption = "<caption>The same image under several budgets</caption>"
    return (
        f'<table class="comparison">{caption}<thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f"{_how_measured(classifier)}"
    )


def _times_faster(full: Look, pruned: Look) -> str:
    ratio = full.milliseconds / pruned.milliseconds
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def _ranked(look: Look) -> list[int]:
    return sorted(range(len(look.probabilities)), key=lambda label: -look.probabilities[label])


def _class_name(id2label: Mapping[int, str], label: int) -> str:
    return escape(shorten(str(id2label[label]), 40, placeholder="..."))


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
