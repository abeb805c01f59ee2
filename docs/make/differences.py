"""The paper of each published system, and what differs from it here."""

from __future__ import annotations

from collections.abc import Mapping

DIFFERENCES: Mapping[str, tuple[str, str]] = {
    "FedAvg on LoRA, FedIT": (
        "McMahan et al. 2017; Zhang et al. 2024",
        "nothing; the average of A and B is not the average of the weights",
    ),
    "FFA-LoRA": (
        "Sun et al., ICLR 2024",
        'A begins with orthonormal rows; the paper\'s own start is `adapter.start = "kaiming"`',
    ),
    "FedSVD": ("Lee et al., NeurIPS 2025", "the SVD is of an r × r core; A travels as an r × r matrix"),
    "Fed-SB on LoRA-SB": (
        "Singhal, Ponkshe et al. 2025",
        "the gradient of the start is clipped, noised and charged; the paper's raw one is refused under privacy",
    ),
    "LoRA-XS, federated": ("Bałazy et al. 2024", "the base stays as it is; R begins at 0"),
    "IntTune of NLoRA": (
        "Guo, Chang, Wu 2025",
        "the core begins at 0; SLoRA and NLoRA, of three factors, are not built",
    ),
    "FedEx-LoRA": (
        "Singhal et al., ACL 2025",
        "the residual goes into a matrix beside the base and travels whole; sites are weighted by public size",
    ),
    "FLoRA": (
        "Wang et al., NeurIPS 2024",
        "the product is merged beside the base; A is drawn from the round's number; all ranks are equal",
    ),
    "RoLoRA": ("Chen et al. 2024", "nothing; the frozen factor keeps its moments at the server"),
    "FlexLoRA, by increments": (
        "Bai et al., NeurIPS 2024",
        "increments are averaged instead of states, so a site's rank forgets nothing",
    ),
    "HetLoRA, padded states and weights by norm": (
        "Cho et al. 2024",
        "A is frozen and shared; ranks are not pruned at the sites; runs without privacy only",
    ),
    "Heterogeneous ranks (HetLoRA, FLoRA), exact": (
        "Cho et al. 2024; Wang et al. 2024",
        "increments of nested columns are averaged, weighted by public size, at one scale",
    ),
    "DyLoRA": ("Valipour et al. 2023", "b is a hash of each example's inputs; A is frozen"),
    "FlyLoRA": ("Zou et al. 2025", "without the load-balancing bias, which would count examples; exported whole"),
    "IncreLoRA": ("Zhang et al. 2023", "the score is the energy that sites' changes share, above that of the noise"),
    "DiffoRA": (
        "Jiang et al. 2025",
        "another method: layers are chosen once after a warm-up by that score, without the paper's relaxation",
    ),
    "DiffoRA, its gates in turn": (
        "Jiang et al. 2025",
        "from the abstract; gates and factors see the same examples; a gate is kept within 0 and 1 at the server",
    ),
    "SwitchLoRA": ("Zhou et al. 2024", "a window of columns moves with the round; the base is never rewritten"),
    "SoRA, and the rank selection of CoDyRA": (
        "Ding et al. 2023; Lu et al. 2024",
        "the threshold acts on singular values at the server, and follows from the noise",
    ),
    "FedSA-LoRA": ("Guo et al., ICLR 2025", "refused: B would stay at a site, trained without noise"),
    "rsLoRA": ("Kalajdzievski 2023", "nothing"),
    "DoRA": ("Liu et al. 2024", "the layer is FedVeil's own, so that each example has its gradient"),
    "DoRA, exact: the magnitudes alone": ("Liu et al. 2024", "the directions are frozen"),
    "DoRA, exact: norms frozen at the start": ("Liu et al. 2024", "the norms are frozen at the base's; A is frozen"),
    "PiSSA": ("Meng, Wang, Zhang 2024", "the base stays; trained are the changes of the factors"),
    "PiSSA, A alone frozen": ("Meng, Wang, Zhang 2024", "A is frozen; B begins at 0 on the base as it is"),
    "MiLoRA, A alone frozen": ("Wang et al. 2024", "A is frozen; B begins at 0 on the base as it is"),
    "MiSS": ("Kang, Yin 2024", "rows of A have length 1 unless `start.normalised = false`"),
    "Full fine-tuning of square layers": (
        "none",
        "nothing: at rank = width A is I and B the weight's change; only layers that are as wide as they are high",
    ),
    "MiSS mini": ("Kang, Yin 2024", "a square matrix between shards of inputs and outputs is trained"),
    "Bone: block affine, later called bat": (
        "Kang, Yin 2024",
        "blocks are of the largest size up to the rank that divides a layer; PEFT's form where all have it",
    ),
    "EVA from public text, ranks not spread": (
        "Paischer et al. 2024",
        "directions come from public text, uncentred; all layers have one rank",
    ),
    "EVA from public text, ranks spread": (
        "Paischer et al. 2024",
        "directions come from public text, uncentred; the mean rank and the largest are settings",
    ),
    "EVA, paid for, ranks not spread": (
        "Paischer et al. 2024",
        "one clipped and noised release of moments, uncentred; all layers have one rank",
    ),
    "LoRA-GA from public records": ("Wang, Yu, Li 2024", "the gradient is of public examples; the base stays"),
    "LoRA-GA from public records, A alone frozen": ("Wang, Yu, Li 2024", "the same with a frozen A"),
    "LoRA-GA, A alone, paid for": (
        "Wang, Yu, Li 2024",
        "one clipped and noised release of a sketch of the gradient; A is frozen",
    ),
    "RandLoRA": ("Albert et al., ICLR 2025", "one of two diagonals is trained, so averages are exact"),
    "LoLDU": ("arXiv 2410.13618", "vectors have length 1; the base is never rewritten; the scale is not trained"),
    "Singular values alone, LoLDU's control": ("none", "a control"),
    "S2-LoRA": (
        "S2-LoRA",
        "the shared pair is random and frozen; the threshold follows from the noise; its data, children's speech, are "
        "not to be had here: `speech-to-text` takes made-up voices or yours",
    ),
    "S2-LoRA, the pair trained in turn": (
        "S2-LoRA",
        "the equation was not to be read: the form follows from the number of its parameters; factors take turns",
    ),
    "SALT": (
        "code of BioMedIA-MBZUAI",
        "one number for scale and shift; no ReLU; one factor frozen; one rank for both parts; no segmentation, for "
        "which no set is to be had here",
    ),
    "LoRA-Pro": ("Wang et al., ICLR 2025", "at the server, weighted by the noise, so nothing divides by B"),
    "ALLoRA": ("Huang, Balestriero 2024", "at the server, behind the optimiser"),
    "AlignGuard": ("Das et al. 2025", "the Fisher matrix is of public text; the collision terms are left out"),
    "FedAdam (FedOpt)": ("Reddi et al. 2021", "nothing"),
    "Block-LoRA": ("Block-LoRA", "is LoRA of another rank and scale"),
    "CoDyRA, from task to task": ("Lu et al. 2024", "the next task is a run on the merged model"),
    "LoRAM": ("Zhang et al. 2025", "units of a layer are chosen on public text; no alignment after the cut"),
    "LoRAPrune": ("Zhang et al. 2024", "one cut between two runs, by squares of noised gradients"),
    "GRPO": (
        "Shao et al. 2024",
        "one step a sample, so no ratio is clipped; no KL term; divided by G · L_max (Dr. GRPO); rewards by name alone",
    ),
    "Gazal-R1": (
        "Gazal-R1, 2025",
        "another model and data; ranks and weights of rewards are ours; no reward for the quality of reasoning",
    ),
    "A LoRA judge as the reward": (
        "arXiv 2506.05748",
        "no rubric with examples in the prompt; as a reward one number, without its reasons; judges of 135M at most",
    ),
    "Trans-LoRA": (
        "Wang et al., NeurIPS 2024",
        "texts are public, not made from a few records; a private vote of the records chooses, not a classifier",
    ),
    "LoRALib": (
        "LoRALib",
        "all adapters on one basis; chosen by noised votes; neither its 680 files nor its trained routers",
    ),
    "LoraHub": (
        "Huang et al. 2023",
        "weights by private gradients, one a layer; theirs are searched without gradients",
    ),
    "SG-LoRA": ("SG-LoRA", "MiniLM's embeddings in place of CLIP's; the weighted mean of the nearest, no generator"),
    "CMLoRA": ("CMLoRA", "its baseline alone"),
    "LiON-LoRA": (
        "Zhang et al., ICCV 2025",
        "norms and overlaps of an adapter's change, not of its features; equal norms by the geometric mean",
    ),
    "RSAR": ("RSAR", "not applicable"),
    "Intruder dimensions": ("Shuttleworth et al. 2024", "counted beside those of the run's noise"),
}
"""By the name of a system in ``docs.make.systems``."""
