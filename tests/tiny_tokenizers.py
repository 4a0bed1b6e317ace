"""Real tokenizers, trained in a moment on a few sentences, one of each kind that models come with; and chat templates
in the manner of well-known ones."""

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Answer in French. Please answer in one sentence of at most ten words, and do not use commas.",
    "user system assistant model: what is the weather like on the coast in the early morning?",
    "    def f(x):\n        return x  # a comment\n\n\nThe naïve café über façade 日本語 Привет",
] * 20

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
QWEN = "{% if messages[0].role != 'system' %}<|start|>system\nYou are a helpful assistant.<|end|>\n{% endif %}" + CHATML
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|pad|>\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|pad|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set first = '' %}{% set loop_messages = messages %}{% endif %}"
    "{% for m in loop_messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first else '' }}"
    "{{ m.content | trim }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>model\n{% endif %}"
)
# No system message, each question asked twice, as some models like it, and answers cut at their left.
TWICE_NO_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|start|>{{ m.role }}\n"
    "{{ m.content if m.role == 'user' else m.content.lstrip() }}<|end|>"
    "{% if m.role == 'user' %}<|start|>again\n{{ m.content.rstrip() }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Looks into contents, in the manner of Qwen 3: thoughts of earlier answers go.
THINKING = (
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c and not loop.last %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}<|start|>{{ m.role }}\n{{ c }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Qwen 3's own, but for tools: which turn is the last is looked up from the end, and thoughts are taken apart.
QWEN3 = r"""
{%- if messages[0].role == 'system' %}{{- '<|start|>system\n' + messages[0].content + '<|end|>\n' }}{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(
            message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|start|>' + message.role + '\n' + content + '<|end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' +
                content.lstrip('\n') }}
        {%- else %}
            {{- '<|start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""
# Answers questions in another way than orders.
QUESTIONS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{{ '<|end|>' if m.content.endswith('?') else '<|pad|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "qwen": QWEN,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "twice_no_system": TWICE_NO_SYSTEM,
    "thinking": THINKING,
    "qwen3": QWEN3,
    "questions": QUESTIONS,
}
SPECIAL = ["<unk>", "<s>", "<|start|>", "<|end|>", "<|pad|>"]


def byte_level(trim_offsets: bool) -> Tokenizer:
    """GPT-2, Llama 3, Qwen: every character is bytes; with `trim_offsets`, tokens deny their white space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim_offsets)])
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece(prepend: bool) -> Tokenizer:
    """Llama 2 (▁ goes before each piece) and Gemma (it does not): spaces are ▁, rare characters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The trainer has no other way to put the bytes into the vocabulary; special they are not.
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(saved))


def metaspace_unigram() -> Tokenizer:
    """T5, XLM-R: a unigram model whose vocabulary holds the special tokens as ordinary pieces too."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def wordpiece() -> Tokenizer:
    """BERT: lower-cased, composed, white space dropped, markers around the whole text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|end|>", special_tokens=[("<s>", 1), ("<|end|>", 3)]
    )
    return tokenizer


_KINDS = {
    "byte_level": lambda: byte_level(False),
    "byte_level_trimmed": lambda: byte_level(True),
    "llama2": lambda: sentencepiece(True),
    "gemma": lambda: sentencepiece(False),
    "unigram": metaspace_unigram,
    "wordpiece": wordpiece,
}
KINDS = tuple(_KINDS)


@cache
def tiny(kind: str, template: str | None = "chatml") -> PreTrainedTokenizerFast:
    """A tokenizer of one of KINDS with the chat template of that name."""
    return wrapped(_KINDS[kind](), TEMPLATES[template] if template else None)


def wrapped(tokenizer: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer as Transformers loads it, with a chat template."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    made.chat_template = template
    return made


def with_flags(tokenizer: Tokenizer, content: str, **flags: bool) -> Tokenizer:
    """A copy in which one added token has other flags (special, lstrip, rstrip)."""
    saved = json.loads(tokenizer.to_str())
    for token in saved["added_tokens"]:
        if token["content"] == content:
            token.update(flags)
    return Tokenizer.from_str(json.dumps(saved))
