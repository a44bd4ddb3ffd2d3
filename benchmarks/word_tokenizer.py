"""Make a chat tokenizer of any size for models with random weights.

Every token is a word, such as `w6` and `w7`. A sampled response therefore has the same number of
tokens when it is encoded again.
"""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<turn>", "<end>")
TEMPLATE = (
    "{% for m in messages %}<turn> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant {% endif %}"
)


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Makes a tokenizer of `size` tokens.

    The first tokens are padding, which also stands for unknown words, start and end of a turn, and
    the roles.
    """
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
