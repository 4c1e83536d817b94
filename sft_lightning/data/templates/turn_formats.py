"""The named templates, as data, with the exact strings of the systems that they come from.

A model must be served with the template that it was trained with, so nothing here may change once released. Names without
a prefix are the field's common templates; `firefly/…`, `vigogne/…` and `chinese_alpaca/…` are the templates of those
systems, which differ from the common ones of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class TurnFormat:
    """The strings of a named template. `{content}` stands for a message's content, `{context}` for Alpaca's `input`.

    In `user`, `{round}` before the content stands for the number of the user message, from 1.
    """

    user: str
    """A user message, up to where the answer begins."""

    assistant: str
    """The answer after a user message, without the stop token."""

    stop: str
    """The stop token; `{eos}` for the tokenizer's EOS."""

    system: str | None = None
    """The system block; `None` if the template has no place for a system message."""

    bos: str = "{bos}"
    """The beginning of the text; `{bos}` for the tokenizer's BOS, if the tokenizer puts one before a text."""

    default_system: str | None = None
    """System text of a conversation without a system message; `None` for no system block."""

    default_system_with_context: str | None = None
    """The same, if the first question has a `context`; `None` for `default_system`."""

    system_in_user: bool = False
    """Whether the system block is part of the first user message, before its content."""

    user_with_context: str | None = None
    """A user message with a `context`; `None` to put the context on a line of its own after the content."""

    strip_before_context: str = ""
    """Characters to remove from the end of a content that a context follows."""

    separator: str = ""
    """Text between an answer and the next user message."""

    trailer: str = ""
    """Text after every stop token; never supervised."""

    strip: bool = False
    """Whether contents lose their surrounding white space; a system text within a user message keeps it."""


_VIGOGNE_SYSTEM = (
    "Vous êtes un assistant IA qui suit extrêmement bien les instructions. Aidez autant que vous le pouvez."
)
_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_CHATML = TurnFormat(
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    assistant="{content}",
    stop="<|im_end|>",
    trailer="\n",
    bos="",
)
_VIGOGNE_INSTRUCT = TurnFormat(
    system="### System:\n{content}\n\n",
    default_system=_ALPACA_SYSTEM,
    user="### Instruction:\n{content}\n\n### Response:\n",
    user_with_context="### Instruction:\n{content} : {context}\n\n### Response:\n",
    strip_before_context="!,-.:;?~ ",
    assistant="{content}",
    stop="{eos}",
)

TURN_FORMATS: Mapping[str, TurnFormat] = {
    # FastChat `vicuna_v1.1` (fastchat/conversation.py, ADD_COLON_TWO): no space between `</s>` and the next `USER:`.
    "vicuna_v1.1": TurnFormat(
        system="{content} ",
        default_system="A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions.",
        user="USER: {content} ASSISTANT:",
        assistant=" {content}",
        stop="</s>",
    ),
    # Stanford Alpaca (train.py PROMPT_DICT): nothing between `### Response:` and the answer.
    "alpaca": TurnFormat(
        system="{content}\n\n",
        default_system=_ALPACA_SYSTEM,
        default_system_with_context="Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.",
        user="### Instruction:\n{content}\n\n### Response:",
        user_with_context="### Instruction:\n{content}\n\n### Input:\n{context}\n\n### Response:",
        assistant="{content}",
        stop="{eos}",
        separator="\n\n",
    ),
    "chatml": _CHATML,
    "qwen": replace(_CHATML, default_system="You are a helpful assistant."),
    # Llama-2-chat's own chat template.
    "llama2": TurnFormat(
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
        system_in_user=True,
        user="[INST] {content} [/INST]",
        assistant=" {content} ",
        stop="</s>",
        separator="<s>",
        strip=True,
    ),
    "llama3": TurnFormat(
        bos="<|begin_of_text|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        assistant="{content}",
        stop="<|eot_id|>",
        strip=True,
    ),
    "gemma": TurnFormat(
        bos="<bos>",
        system="{content}\n\n",
        system_in_user=True,
        user="<start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n",
        assistant="{content}",
        stop="<end_of_turn>",
        trailer="\n",
        strip=True,
    ),
    # Mistral-7B-Instruct v0.3's layout.
    "mistral": TurnFormat(
        system="{content}\n\n",
        system_in_user=True,
        user="[INST] {content}[/INST]",
        assistant=" {content}",
        stop="</s>",
    ),
    "zephyr": TurnFormat(
        bos="",
        system="<|system|>\n{content}</s>\n",
        user="<|user|>\n{content}</s>\n<|assistant|>\n",
        assistant="{content}",
        stop="</s>",
        trailer="\n",
    ),
    "phi3": TurnFormat(
        bos="",
        system="<|system|>\n{content}<|end|>\n",
        user="<|user|>\n{content}<|end|>\n<|assistant|>\n",
        assistant="{content}",
        stop="<|end|>",
        trailer="\n",
    ),
    # Dahoas/rm-static and its relatives, as DeepSpeed-Chat reads them.
    "human_assistant": TurnFormat(user="\n\nHuman: {content}\n\nAssistant:", assistant=" {content}", stop="{eos}"),
    "vigogne/instruct_en": _VIGOGNE_INSTRUCT,
    "vigogne/instruct_fr": replace(
        _VIGOGNE_INSTRUCT,
        default_system="Ci-dessous se trouve une instruction qui décrit une tâche à accomplir. Rédigez une réponse qui "
        "répond de manière précise à la demande.",
    ),
    "vigogne/chat_v2": TurnFormat(
        system="<|system|>: {content}",
        default_system=_VIGOGNE_SYSTEM,
        user="\n<|user|>: {content}\n<|assistant|>:",
        assistant=" {content}",
        stop="{eos}",
    ),
    "vigogne/chat_v3": TurnFormat(
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
        system_in_user=True,
        default_system=_VIGOGNE_SYSTEM,
        user="[INST] {content} [/INST]",
        assistant=" {content}",
        stop="{eos}",
        separator=" ",
    ),
    "chinese_alpaca/1": TurnFormat(
        user=_ALPACA_SYSTEM + "\n\n### Instruction:\n{content}\n\n### Response: ", assistant="{content}", stop="{eos}"
    ),
    "chinese_alpaca/2": TurnFormat(
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
        system_in_user=True,
        default_system="You are a helpful assistant. 你是一个乐于助人的助手。",
        user="[INST] {content} [/INST]",
        assistant=" {content}",
        stop="{eos}",
    ),
    # Firefly and its CS5340 derivative (component/template.py). Where its `system_format` is no more than the BOS, that
    # is `bos` here, and there is no place for a system message.
    "firefly/default": TurnFormat(
        bos="",
        system="System: {content}\n\n",
        user="User: {content}\nAssistant: ",
        assistant="{content} ",
        stop="{eos}",
        strip=True,
    ),
    "firefly/internlm": TurnFormat(
        bos="",
        system="<|System|>:{content}\n",
        default_system="You are an AI assistant whose name is InternLM (书生·浦语).\n- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as English and 中文.",
        user="<|User|>:{content}\n<|Bot|>:",
        assistant="{content}",
        stop="</s>",
        trailer="\n",
        strip=True,
    ),
    "firefly/internlm2": TurnFormat(
        bos="",
        system="<|im_start|>system\n{content}<|im_end|>\n",
        default_system="You are an AI assistant whose name is InternLM (书生·浦语).\n- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as English and 中文.",
        user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
        assistant="{content}",
        stop="<|im_end|>",
        trailer="\n",
        strip=True,
    ),
    "firefly/qwen": TurnFormat(
        bos="",
        system="<|im_start|>system\n{content}<|im_end|>\n",
        default_system="You are a helpful assistant.",
        user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
        assistant="{content}",
        stop="<|im_end|>",
        trailer="\n",
        strip=True,
    ),
    "firefly/yi": TurnFormat(
        bos="",
        system="<|im_start|>system\n{content}<|im_end|>\n",
        user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
        assistant="{content}",
        stop="<|im_end|>",
        trailer="\n",
        strip=True,
    ),
    "firefly/orion": TurnFormat(
        bos="<s>",
        system=None,
        user="Human: {content}\n\nAssistant: </s>",
        assistant="{content}",
        stop="</s>",
        strip=True,
    ),
    "firefly/deepseek": TurnFormat(
        bos="",
        system=None,
        user="User: {content}\n\nAssistant: ",
        assistant="{content}",
        stop="<｜end▁of▁sentence｜>",
        strip=True,
    ),
    # component/dataset.py puts what the ChatGLM tokenizers build by methods of their own into ids: their prefix
    # (`get_prefix_tokens`), roles (`get_command`) and EOS; here they are text. It strips contents and counts from 1.
    "firefly/chatglm2": TurnFormat(
        bos="[gMASK]sop",
        system=None,
        user="[Round {round}]\n\n问：{content}\n\n答：",
        assistant="{content}",
        stop="{eos}",
        strip=True,
    ),
    "firefly/chatglm3": TurnFormat(
        bos="[gMASK]sop",
        system="<|system|>{content}",
        default_system="You are ChatGLM3, a large language model trained by Zhipu.AI. Follow the user's instructions carefully. Respond using markdown.",
        user="<|user|>{content}<|assistant|>",
        assistant="{content}",
        stop="{eos}",
        strip=True,
    ),
    "firefly/ziya2": TurnFormat(
        bos="", system=None, user="<human>:{content} <bot>:", assistant="{content}", stop="</s>", strip=True
    ),
    "firefly/xverse": TurnFormat(
        bos="",
        system=None,
        user="Human: {content}\n\nAssistant: ",
        assistant="{content}",
        stop="<|endoftext|>",
        strip=True,
    ),
    "firefly/minicpm": TurnFormat(
        bos="", system=None, user="<用户>{content}<AI>", assistant="{content}", stop="</s>", strip=True
    ),
    "firefly/minicpm3": TurnFormat(
        bos="",
        system="<|im_start|>system\n{content}<|im_end|>\n",
        default_system="You are a helpful assistant.",
        user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
        assistant="{content}",
        stop="<|im_end|>",
        trailer="\n",
        strip=True,
    ),
    "firefly/zephyr": TurnFormat(
        bos="",
        system="<|system|>\n{content}</s>",
        user="<|user|>\n{content}</s>\n<|assistant|>\n",
        assistant="{content}",
        stop="</s>",
        trailer="\n",
        strip=True,
    ),
    "firefly/mistral": TurnFormat(
        bos="<s>", system=None, user="[INST]{content}[/INST]", assistant="{content}", stop="</s>", strip=True
    ),
    "firefly/mixtral": TurnFormat(
        bos="<s>", system=None, user="[INST]{content}[/INST]", assistant="{content}", stop="</s>", strip=True
    ),
    "firefly/baichuan": TurnFormat(
        bos="",
        system=None,
        user="<reserved_102>{content}<reserved_103>",
        assistant="{content}",
        stop="</s>",
        strip=True,
    ),
    "firefly/baichuan2": TurnFormat(
        bos="",
        system=None,
        user="<reserved_106>{content}<reserved_107>",
        assistant="{content}",
        stop="</s>",
        strip=True,
    ),
    "firefly/vicuna": TurnFormat(
        bos="",
        system="{content}\n",
        default_system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions.",
        user="USER: {content} ASSISTANT:",
        assistant="{content}",
        stop="</s>",
        strip=True,
    ),
    "firefly/llama2": TurnFormat(
        bos="",
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
        default_system="You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a question does not make any sense, or is not factually coherent, explain why instead of answering something not correct. If you don't know the answer to a question, please don't share false information.",
        user="[INST]{content}[/INST]",
        assistant="{content} ",
        stop="</s>",
        strip=True,
    ),
    "firefly/llama3": TurnFormat(
        bos="",
        system="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        assistant="{content}",
        stop="<|eot_id|>",
        strip=True,
    ),
    "firefly/gemma": TurnFormat(
        bos="<bos>",
        system=None,
        user="<start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n",
        assistant="{content}",
        stop="<eos>",
        trailer="\n",
        strip=True,
    ),
    "firefly/phi3": TurnFormat(
        bos="",
        system=None,
        user="<|user|>\n{content}<|end|>\n<|assistant|>",
        assistant="{content}",
        stop="<|end|>",
        trailer="\n",
        strip=True,
    ),
    "firefly/mamba": TurnFormat(
        bos="",
        system="<|system|>\n{content}</s>",
        user="<|user|>\n{content}</s>\n<|assistant|>\n",
        assistant="{content}",
        stop="</s>",
        trailer="\n",
        strip=True,
    ),
}
