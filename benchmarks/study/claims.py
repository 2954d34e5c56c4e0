"""What the papers claim of their methods, restated so that the study at equal trained count can say whether it holds here."""

from __future__ import annotations

from typing import NamedTuple


class Claim(NamedTuple):
    """A claim about a method.

    Attributes:
        method: its name.
        text: the claim, restated for this study.
        other: the method that it is to be compared with; empty for a claim that a test or another measurement holds.
        at_least: the difference in points of macro-F1 that the claim asks for.
        elsewhere: for a claim without ``other``, where it is held.
    """

    method: str
    text: str
    other: str = ""
    at_least: float = 0.0
    elsewhere: str = ""


_AS_LORA = "at least conv LoRA's F1"
CLAIMS = (
    Claim("lora_edge", "within 4.7 points of full fine-tuning", "full", -4.7),
    Claim("memflora", "3 points more than LoRA-Edge as published, at equal rank", "lora_edge_paper", 3.0),
    Claim("memflora", "3 points more than LoRA-C, at equal rank", "lora_c", 3.0),
    Claim("paca", "at most 1 point below conv LoRA", "conv_lora", -1.0),
    Claim("one_for_all", "the first and the last layer alone reach 95 % of conv LoRA's F1", "conv_lora", -4.0),
    Claim("rslora", _AS_LORA, "conv_lora"),
    Claim("matryoshka", "at its full rank within 1 point of conv LoRA at that rank", "conv_lora", -1.0),
    Claim("tera", "at least what other vectors per layer reach, here BatchNorm's scale and shift", "bn_only"),
    Claim("tera", "as good as adapters of high rank, with far fewer parameters", "conv_lora", -1.0),
    Claim("one_bit", "one bit per element loses at most 1 point", "conv_lora", -1.0),
    Claim("shira", "random entries of the weight reach " + _AS_LORA, "conv_lora"),
    Claim("shira_wm", "the largest entries reach " + _AS_LORA, "conv_lora"),
    Claim("shira_grad", "the entries of largest gradient reach " + _AS_LORA, "conv_lora"),
    Claim("shira_snip", "the entries that SNIP chooses reach " + _AS_LORA, "conv_lora"),
    Claim("shira_struct", "the diagonal and some columns reach " + _AS_LORA, "conv_lora"),
    Claim("randlora", "an update of full rank reaches " + _AS_LORA, "conv_lora"),
    Claim("salt", _AS_LORA, "conv_lora"),
    Claim("salt_linear", "ours: without the ReLU no worse than with it", "salt"),
    Claim("loldu", "a few diagonal entries per layer reach at least what the biases do", "bias_only"),
    Claim("loldu_full", "the whole diagonal comes within 2 points of conv LoRA", "conv_lora", -2.0),
    Claim("lora_xs", _AS_LORA, "conv_lora"),
    Claim("lora_sb", "better than LoRA-XS", "lora_xs"),
    Claim("lora_sb", _AS_LORA + ", with 27 to 90 times fewer parameters", "conv_lora"),
    Claim("snell", _AS_LORA, "conv_lora"),
    Claim("qwha", "on a base of 4 bits at most 1 point below conv LoRA on the float base", "conv_lora", -1.0),
    Claim(
        "qwha",
        "before training, a smaller layer error than the quantised base's and its best low-rank repair's",
        elsewhere="held by tests/methods/test_qwha.py",
    ),
    Claim("lora_ga", "at the same rank and number of steps " + _AS_LORA, "conv_lora"),
    Claim("hydra", "at least the branch beside the layer alone, which is conv LoRA", "conv_lora"),
    Claim("hydra", "at least the branch behind the layer alone", "hydra_sequential"),
    Claim("block_lora", "within 1 point of LoRA", "conv_lora", -1.0),
    Claim("s2ft", _AS_LORA, "conv_lora"),
    Claim("s2ft_columns", "columns of the reader are at least as good as rows of the maker", "s2ft_rows"),
    Claim("pissa", _AS_LORA, "conv_lora"),
    Claim("pissa_fast", "the randomised SVD loses nothing", "pissa", -0.5),
    Claim("pissa_4bit", "a residual of 4 bits loses at most 1 point", "pissa", -1.0),
    Claim("unilora", "one vector for the whole model comes within 1 point of conv LoRA", "conv_lora", -1.0),
    Claim("wara", _AS_LORA, "conv_lora"),
    Claim("vera", "two vectors per layer on a shared random pair come within 1 point of conv LoRA", "conv_lora", -1.0),
    Claim("s2_lora", "with one pair of factors for all layers within 1 point of LoRA", "conv_lora", -1.0),
    Claim("dora", "better than LoRA", "conv_lora"),
)
