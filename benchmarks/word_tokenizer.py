"""A chat tokenizer of any size for models with random weights: every token is a word, `w3`, `w4` …

What such a model says is as many words as it has tokens, and reads as many tokens again.
"""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<turn>", "<end>")
TEMPLATE = (
    "{% for m in messages %}<turn> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant {% endif %}"
)


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """`size` tokens: padding (unknown words too), start and end of a turn, the roles, the rest."""
    roles = ("user", "assistant", "system")
    words = [*SPECIAL, *roles, *(f"w{number}" for number in range(len(SPECIAL + roles), size))]
    model = models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=SPECIAL[0])
    core = Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, start, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        unk_token=pad,
        bos_token=start,
        eos_token=end,
        chat_template=TEMPLATE,
    )
