"""Families that the product refuses, by what their sentence says, and those that stand apart."""

TRANSFORMED = "does more than a linear head"  # a dense layer and a norm before the product
AHEAD = "depends on those that follow it"
CONFIG = "is none of transformers' causal language models"
UNREAD = "cannot read"

# By family: what a student's refusal says.
REFUSED = {
    **dict.fromkeys(
        ("bert", "big_bird", "camembert", "data2vec-text", "dory", "electra", "ernie",
         "megatron-bert", "modernbert-decoder", "prophetnet", "rembert", "roberta",
         "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        TRANSFORMED,
    ),
    "blt": UNREAD,
    "cpmant": AHEAD,
    "emu3": CONFIG,  # its text model is saved as a class that the mapping lacks
    "gemma4_unified_assistant": UNREAD,  # drafts from the states of another model
    "mllama": CONFIG,
    "reformer": UNREAD,  # its factored positions want one length
    "xlm": AHEAD,
    "xlnet": AHEAD,
}  # fmt: skip

# By family: why it is not tried at all.
APART = {
    "gemma3n": "its vision tower needs packages beyond transformers",
    "gemma4_assistant": "drafts from the states of another model, and has no default config",
    "musicgen": "transformers cannot make it from its own config",
    "musicgen_melody": "transformers cannot make it from its own config",
}

# By family: what a loss on its hidden states is refused with.
NOT_STATED = dict.fromkeys(  # which have several streams
    ("deepseek_v4", "gemma3n_text", "hy_v4"), "do not give one state per token"
)

# By family: stages that are not tried, and why.
STAGES_APART = {
    "moshi": ({"continues"}, "its own cache gives other logits than it has without one"),
    "xlstm": ({"continues"}, "its own cache does not fit heads of unlike widths"),
    "youtu": ({"full"}, "refused: loading empties its padding token's row, which its head shares"),
    "laguna": ({"lora"}, "peft loses the adapters of its shared experts when it loads them"),
}
