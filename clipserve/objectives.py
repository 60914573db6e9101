"""The terms of the loss, as a configuration names them: `[[objectives]] name = "contrastive"`.

Each class is one kind; docs/objectives.md has their formulas. What can not be meant is refused by
`check_objectives`, with the reason.
"""

from typing import Annotated, Literal

from pydantic import Field

from clipserve.sections import Fraction, Section, Weight

Same = Literal["picture", "caption", "label"]


class Contrastive(Section):
    """Symmetric InfoNCE over the global batch (CLIP); with `positives` also UniCL."""

    name: Literal["contrastive"]
    """symmetric InfoNCE between pictures and captions of the global batch (CLIP)"""
    weight: Weight = 1.0
    """factor of this term in the sum"""
    positives: tuple[Same, ...] = ()
    """pairs that agree in any of these (`picture`, `caption`, `label`) are no negatives"""
    tile_size: Annotated[int, Field(ge=1)] | None = None
    """rows computed at a time, in memory that grows with the batch and not its square"""


class Sigmoid(Section):
    """Pairwise sigmoid loss with a bias (SigLIP)."""

    name: Literal["sigmoid"]
    """a yes or no for each pair of picture and caption (SigLIP); the model needs a logit bias"""
    weight: Weight = 1.0
    """factor of this term in the sum"""
    positives: tuple[Same, ...] = ()
    """pairs that agree in any of these (`picture`, `caption`, `label`) count as matching"""
    chunk_size: Annotated[int, Field(ge=1)] | None = None
    """captions compared at a time, so that no square of the batch is kept; absent: all"""
    exchange: Literal["gather", "ring"] = "gather"
    """how several processes see each other's captions: all at once, or passed round"""


class MomentumContrast(Section):
    """Contrast with a momentum encoder's features, queued, and distillation from it (ALBEF)."""

    name: Literal["momentum_contrast"]
    """InfoNCE against a momentum copy's features of this batch and of a queue (MoCo, ALBEF)"""
    weight: Weight = 1.0
    """factor of this term in the sum"""
    queue_size: Annotated[int, Field(ge=0)] = 65536
    """pairs of earlier batches that are kept as negatives"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """of the momentum copy: the part of it that each step keeps"""
    alpha: Fraction = 0.4
    """part of the target that is the momentum copy's own answer; 0: no distillation"""
    alpha_ramp_epochs: Annotated[float, Field(ge=0)] = 1.0
    """epochs over which alpha grows from 0"""
    positives: tuple[Same, ...] = ("picture", "caption")
    """pairs that agree in any of these, in batch or queue, are no negatives"""


class Matching(Section):
    """Image-text matching with hard negatives (ALBEF's ITM)."""

    name: Literal["matching"]
    """does this caption belong to this picture, asked of hard negatives too (ALBEF's ITM)"""
    weight: Weight = 1.0
    """factor of this term in the sum"""
    negatives: Literal["process", "batch"] = "process"
    """where negatives are drawn from: the own process's part of the batch, or all of it"""
    positives: tuple[Same, ...] = ("picture", "caption")
    """pairs that agree in any of these are never drawn as negatives"""


class MaskedLanguage(Section):
    """Masked words from caption and picture (BERT's MLM, as in ALBEF)."""

    name: Literal["masked_language"]
    """masked words, guessed from the rest of the caption and the picture (ALBEF's MLM)"""
    weight: Weight = 1.0
    """factor of this term in the sum"""
    probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """part of the words that is masked"""
    alpha: Fraction = 0.4
    """part of the target that is the momentum copy's guess; ramped as momentum_contrast's"""


class Distillation(Section):
    """Knowledge of a frozen teacher."""

    name: Literal["distill"]
    """be like a larger, frozen CLIP"""
    weight: Weight = 1.0
    """factor of this term in the sum"""
    teacher: Annotated[str, Field(min_length=1)]
    """clipserve model directory of the teacher"""
    features: Annotated[float, Field(ge=0)] = 1.0
    """weight of: vectors as the teacher's, after a linear map where their lengths differ"""
    affinity: Annotated[float, Field(ge=0)] = 1.0
    """weight of: similarities within the batch as the teacher's"""


class SelfSupervision(Section):
    """Two views of each picture, on the same image tower."""

    weight: Weight = 1.0
    """factor of this term in the sum"""
    hidden_size: Annotated[int, Field(ge=1)] = 4096
    """width of the head's hidden layers"""
    output_size: Annotated[int, Field(ge=1)] = 256
    """length of the head's vectors"""
    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """area of the views' random crops as a fraction of the picture"""


class SimCLR(SelfSupervision):
    """Contrast of the views (SLIP)."""

    name: Literal["simclr"]
    """two augmented views of a picture, found among those of the others (SimCLR; makes it SLIP)"""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """of the similarities"""


class Agreement(SelfSupervision):
    """Views that agree, without negatives."""

    name: Literal["barlow_twins", "vicreg", "simsiam"]
    """two augmented views of a picture have to agree, in one of three ways without negatives"""


class Captioning(Section):
    """The caption, word by word, from the picture (CoCa)."""

    name: Literal["captioning"]
    """the caption's next word, given the picture (CoCa); needs a CoCa architecture"""
    weight: Weight = 1.0
    """factor of this term in the sum; CoCa uses 2"""


Objective = Annotated[
    Contrastive
    | Sigmoid
    | MomentumContrast
    | Matching
    | MaskedLanguage
    | Distillation
    | SimCLR
    | Agreement
    | Captioning,
    Field(discriminator="name"),
]


def find_momentum(objectives: tuple[Objective, ...]) -> MomentumContrast | None:
    """The objective that owns the momentum copy, if there is one."""
    return next((o for o in objectives if isinstance(o, MomentumContrast)), None)


def check_objectives(objectives: tuple[Objective, ...]) -> None:
    """Raises ValueError for a list that can not be meant."""
    names = [objective.name for objective in objectives]
    if not names:
        raise ValueError('objectives is empty; add [[objectives]] name = "contrastive"')
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"objectives names {name} twice; give it once, with one weight")
    if "sigmoid" in names:
        ranking = ("contrastive", "momentum_contrast")
        other = [o.name for o in objectives if o.name in ranking or _compares(o)]
        if other:
            raise ValueError(
                f"sigmoid and {other[0]} would pull one temperature two ways: the one wants a"
                " probability of each pair, the other a ranking; keep one of them"
            )
    if not {"contrastive", "sigmoid", "momentum_contrast", "distill"} & set(names):
        raise ValueError(
            f"objectives {', '.join(names)} do not bring pictures and captions together, which"
            " search and classification need; add contrastive, sigmoid or momentum_contrast"
        )
    if "matching" in names and not {"contrastive", "momentum_contrast"} & set(names):
        raise ValueError(
            "matching draws its hard negatives by contrastive similarity; add contrastive or"
            " momentum_contrast"
        )
    for objective in objectives:
        _check_one(objective, objectives)


def _compares(objective: Objective) -> bool:
    """Whether a distillation ranks the batch by the student's temperature."""
    return isinstance(objective, Distillation) and objective.affinity > 0


def _check_one(objective: Objective, objectives: tuple[Objective, ...]) -> None:
    if isinstance(objective, MaskedLanguage) and objective.alpha and not find_momentum(objectives):
        raise ValueError(
            "masked_language with alpha learns from the momentum copy that momentum_contrast"
            " keeps; add momentum_contrast, or set alpha = 0"
        )
    if isinstance(objective, Distillation) and not objective.features + objective.affinity:
        raise ValueError("distill with features = 0 and affinity = 0 does nothing; raise one")
    if isinstance(objective, SelfSupervision):
        scales = {o.crop_scale for o in objectives if isinstance(o, SelfSupervision)}
        if len(scales) > 1:
            raise ValueError(
                f"{objective.name} and its like share their two views, but name different"
                " crop_scale; give all the same"
            )
        low, high = objective.crop_scale
        if not 0 < low <= high:
            raise ValueError(
                f"crop_scale [{low}, {high}] of {objective.name} must be 0 < low <= high"
            )


def check_against_architecture(
    objectives: tuple[Objective, ...],
    *,
    has_fusion: bool,
    has_token_head: bool,
    has_bias: bool,
    has_decoder: bool,
) -> None:
    """Raises ValueError where an objective needs a part that the model lacks."""
    for objective in objectives:
        if isinstance(objective, Matching | MaskedLanguage) and not has_fusion:
            raise ValueError(
                f"{objective.name} needs fusion layers, which look at picture and caption"
                " together; use an ALBEF architecture (preset albef_tiny or albef_vit_b16)"
            )
        if isinstance(objective, MaskedLanguage) and not has_token_head:
            raise ValueError(
                "masked_language needs a head for masked words, which this model was saved"
                " without (fusion_cfg.token_head = false); leave the objective out"
            )
        if isinstance(objective, Sigmoid) and not has_bias:
            raise ValueError(
                "sigmoid needs a logit bias; add init_logit_bias = -10 and init_logit_scale ="
                " 2.3026 to model.architecture (preset siglip_vit_b16 has them)"
            )
        if isinstance(objective, Captioning) and not has_decoder:
            raise ValueError(
                "captioning needs a text decoder; use a CoCa architecture (coca_ViT-B-32)"
            )
