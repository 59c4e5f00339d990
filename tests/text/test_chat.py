"""Chats rendered as transformers renders them, and templates that are wrong, hostile or endless."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_files import QWEN3

from kvist.errors import RequestError
from kvist.text import chat, sandbox

USER = [{"role": "user", "content": "Hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Väder <now> & 'later'",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {
    "role": "assistant",
    "content": "Let me see.",
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Å"}}}
    ],
}
CONVERSATIONS = {
    "plain": USER,
    "system": [{"role": "system", "content": "Be brief."}, *USER],
    "turns": [*USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi"}, *USER],
    "tools": [*USER, CALL, {"role": "tool", "content": "<b>12°</b>"}],
    "arguments as text": [
        *USER,
        {**CALL, "tool_calls": [{"function": {"name": "weather", "arguments": '{"city":"Å"}'}}]},
    ],
    "reasoning": [*USER, {"role": "assistant", "reasoning": "hm", "content": "Hi"}],
    "names": [{"role": "user", "content": "a", "name": "Ann", "tool_calls": None}],
}


def rendered(template, messages=USER, **options):
    options.setdefault("special_tokens", {})
    return chat.render(template, messages, **options)


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(QWEN3)


@pytest.fixture(scope="module")
def apply(theirs):
    """The same, rendered by transformers."""

    def apply(messages, template=None, **options):
        options.setdefault("add_generation_prompt", True)
        return theirs.apply_chat_template(
            messages, chat_template=template, tokenize=False, **options
        )

    return apply


def test_reference_chat_is_rendered_and_encoded_exactly(qwen3):
    example = json.loads((QWEN3 / "ref.json").read_text())["chat"]
    options = {"special_tokens": qwen3.special_tokens}
    text = rendered(qwen3.chat_template, example["messages"], **options)
    assert text == example["text"]
    assert qwen3.encode(text) == example["ids"]
    text = rendered(qwen3.chat_template, example["messages"], enable_thinking=False, **options)
    assert text == example["text_no_think"]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [], TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_conversations_equal_transformers(qwen3, apply, name, tools, prompt):
    messages = CONVERSATIONS[name]
    options = {"tools": tools, "add_generation_prompt": prompt}
    assert rendered(qwen3.chat_template, messages, **options) == apply(messages, **options)


@given(
    messages=st.lists(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(("system", "user", "assistant", "tool")),
                "content": st.text(max_size=20),
            },
            optional={"reasoning_content": st.text(max_size=5)},
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_conversation_equals_transformers(qwen3, apply, messages):
    assert rendered(qwen3.chat_template, messages) == apply(messages)


def test_smollm2s_template_puts_its_own_system_message_first(smollm2_metadata):
    template = smollm2_metadata["tokenizer.chat_template"]
    assert rendered(template, USER) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


FEATURES = {
    "tojson": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}",
    "tojson options": "{{ tools | tojson(separators=(',', ':'), sort_keys=True) }}"
    "{{ 'Å<&>' | tojson }}{{ 'Å' | tojson(ensure_ascii=True) }}",
    "blocks": "  {% if true %}\n  a\n  {% endif %}\n  {%- if true -%}\n b {% endif %}\n\nc\n",
    "loop controls": "{% for m in messages * 3 %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{{ loop.index }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}\n"
    "{% endgeneration %}{{ x is defined }}{% endfor %}",
    "namespace": "{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}"
    "{% endfor %}{{ ns.a }}{{ dict(a=1) }}",
    "macros": "{% macro f(x, y=2) %}{{ x }}{{ y }}{{ caller() if caller }}{% endmacro %}"
    "{{ f(1) }}{% call f(3) %}in{% endcall %}",
    "special tokens": "{{ eos_token }}{{ pad_token }}{{ bos_token is defined }}{{ unk_token }}",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{{ documents is none }}{{ tools is none }}",
    "strings": "{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ 'a' ~ 1 }}{{ ' x '.strip() }}{{ 'a,b'.split(',') }}",
    "recursion": "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}"
    "{% endfor %}",
    "unicode": "{{ 'İ'.lower() }}{{ messages[0].content | upper }}{{ '\\u00e5' }}",
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_of_templates_equal_transformers(qwen3, apply, name):
    template = FEATURES[name]
    special_tokens = qwen3.special_tokens
    ours = rendered(template, USER, tools=TOOLS, special_tokens=special_tokens)
    assert ours == apply(USER, template, tools=TOOLS)


def test_variables_of_the_caller_go_before_special_tokens(apply):
    ours = rendered("{{ eos_token }}", special_tokens={"eos_token": "a"}, eos_token="b")
    assert ours == apply(USER, "{{ eos_token }}", eos_token="b") == "b"


def test_strftime_now_gives_todays_date():
    before = time.strftime("%Y-%m-%d")
    assert rendered("{{ strftime_now('%Y-%m-%d') }}") in (before, time.strftime("%Y-%m-%d"))


def test_developer_speaks_as_system_where_the_template_knows_no_developer(qwen3):
    developer = [{"role": "developer", "content": "Be brief."}, *USER]
    system = [{"role": "system", "content": "Be brief."}, *USER]
    template = qwen3.chat_template
    assert rendered(template, developer) == rendered(template, system)
    assert rendered("{% if 'developer' %}{{ messages[0].role }}{% endif %}", developer) == (
        "developer"
    )


def test_messages_are_left_as_they_were(qwen3):
    messages = [{"role": "developer", "content": [{"type": "text", "text": "a"}], "reasoning": "b"}]
    copy = json.loads(json.dumps(messages))
    rendered(qwen3.chat_template, messages)
    assert messages == copy


# --- what goes wrong in a template


def test_raise_exception_says_what_the_template_says():
    template = "{{ raise_exception('Roles must\nalternate: user, ' + messages[0].role) }}"
    with pytest.raises(RequestError) as caught:
        rendered(template)
    assert str(caught.value) == (
        "the chat template refused the messages: Roles must alternate: user, user"
    )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a\n{% for %}", " in line 2: Expected"),
        ("{{ messages[0].a.b }}", "has no attribute 'a'"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages | nosuch }}", "No filter named 'nosuch'"),
        ("{% include 'other' %}", "no loader"),
        ("{{ [] | first | tojson }}", "not JSON serializable"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_mistakes_in_a_template_are_told_in_one_line(template, words):
    with pytest.raises(RequestError, match=f"^the chat template failed.*{words}[^\n]*$"):
        rendered(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{{ self._TemplateReference__context.environment.from_string('a') }}",
    ],
)
def test_template_cannot_leave_its_sandbox(template):
    with pytest.raises(RequestError, match=r"unsafe|undefined|no attribute"):
        rendered(template)


def test_internals_look_empty_from_within_the_sandbox():
    assert rendered("{{ ''.__class__ }}{{ '{0.__class__}'.format(messages) }}") == ""


ENDLESS = {
    "{% for i in range(1000000000) %}{% endfor %}": "Range too big",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "steps",
    "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}": "steps",
    "{{ 'a' * 1000000000 }}": "repeats a value",
    "{{ 1000000000 * [0] }}": "repeats a value",
    "{{ 9 ** 99999 }}": "number of more than",
    "{% set n = namespace(a=3) %}{% for i in range(99) %}{% set n.a = n.a * n.a %}{% endfor %}": (
        "number of more than"
    ),
    "{% set a = 'a' * 1000000 %}{% for i in range(99999) %}{{ a }}{% endfor %}": "writes more than",
}


@pytest.mark.parametrize("template", ENDLESS)
def test_endless_templates_are_stopped(monkeypatch, template):
    monkeypatch.setattr(sandbox, "MAX_STEPS", 20_000)
    with pytest.raises(RequestError, match=ENDLESS[template]):
        rendered(template)


def test_steps_are_counted_for_each_rendering_anew():
    template = "{% for i in range(90000) %}{% endfor %}done"
    assert all(rendered(template) == "done" for _ in range(12))


def test_long_chats_are_far_from_the_limits(qwen3):
    messages = [*USER, {"role": "assistant", "content": "Hi"}] * 1000
    assert rendered(qwen3.chat_template, messages).count("<|im_end|>") == 2000


def test_templates_are_compiled_once_and_not_kept_without_bound():
    template = "{{ messages[0].content }} once"
    rendered(template)
    misses = sandbox._compile.cache_info().misses
    rendered(template)
    assert sandbox._compile.cache_info().misses == misses
    for i in range(sandbox._compile.cache_info().maxsize + 1):
        rendered(f"{i}")
    rendered(template)
    assert sandbox._compile.cache_info().misses > misses + i


def test_model_without_a_template_is_told_so():
    with pytest.raises(RequestError, match="no chat template; give the prompt as text"):
        rendered(None)


# --- messages


def test_text_parts_are_joined_as_they_are():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert chat.normalise_messages([{"role": "user", "content": parts}]) == [
        {"role": "user", "content": "a b"}
    ]


def test_images_keep_the_parts_apart():
    image = object()
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image", "image": image},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    ]
    [message] = chat.normalise_messages([{"role": "user", "content": parts}])
    assert message["content"] == [
        {"type": "text", "text": "What is this?"},
        {"type": "image", "image": image},
        {"type": "image", "image": "data:image/png;base64,AA=="},
    ]


def test_normalised_messages_pass_through_unchanged():
    messages = [
        *CONVERSATIONS["tools"],
        {"role": "user", "content": [{"type": "image", "image": 1}]},
    ]
    once = chat.normalise_messages(messages)
    assert chat.normalise_messages(once) == once


def test_call_of_a_tool_needs_no_content(qwen3):
    message = {**CALL, "content": None, "refusal": None}
    [normalised] = chat.normalise_messages([message])
    assert normalised == {**CALL, "content": ""}
    without = {name: value for name, value in CALL.items() if name != "content"}
    assert chat.normalise_messages([without]) == [normalised]
    assert "<tool_call>" in rendered(qwen3.chat_template, [*USER, message])


def test_image_is_refused_by_a_model_for_text():
    messages = [*USER, {"role": "user", "content": [{"type": "image", "image": "a.png"}]}]
    with pytest.raises(RequestError, match=r"messages\[1\] .*this model takes no images"):
        rendered("{{ messages }}", messages)


def test_template_sees_where_an_image_is_and_nothing_of_it():
    parts = [{"type": "image", "image": object()}, {"type": "text", "text": "?"}]
    template = "{% for p in messages[0].content %}{{ p.text or p.image }}{% endfor %}"
    messages = [{"role": "user", "content": parts}]
    assert rendered(template, messages, allow_images=True) == "<image>?"


def test_subclasses_of_plain_types_reach_the_template_as_plain():
    class Colour(str):
        def leak(self):
            return "leaked"

    assert rendered("{{ colour }}{{ colour.leak }}", colour=Colour("red")) == "red"


def test_what_is_not_json_is_refused_by_name():
    with pytest.raises(RequestError, match=r"tools\[0\]\.function is of type builtin_function"):
        rendered("{{ tools }}", tools=[{"function": print}])


def test_what_contains_itself_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(RequestError, match="recursion"):
        rendered("a", documents=loop)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages is empty"),
        ("Hello", "messages must be a list .* not 'Hello'"),
        ({"role": "user"}, "messages must be a list .* not {'role': 'user'}"),
        (None, "messages must be a list .* not None"),
        ([*USER, "Hello"], r"messages\[1\] must be an object .* not 'Hello'"),
        ([{"content": "a"}], r"messages\[0\] has the role None"),
        ([*USER, {"role": "usr", "content": "a"}], r"messages\[1\] has the role 'usr'.*'user'"),
        ([{"role": ["user"], "content": "a"}], r"messages\[0\] has the role \['user'\]"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "assistant", "content": None}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 5}], r"messages\[0\] has the content 5"),
        ([{"role": "user", "content": b"a"}], r"messages\[0\] has the content b'a'"),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\] content\[0\] is 'a'"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "audio"}]}],
            r"messages\[0\] content\[1\] is {'type': 'audio'}",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\] is {'type': 'text'}"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"content\[0\] is {'type': 'image'}"),
        ([{"role": "user", "content": {"x": "y" * 500}}], r"yyy\.\.\.; it must be text"),
    ],
)
def test_malformed_messages_are_named(messages, words):
    with pytest.raises(RequestError, match=words):
        chat.normalise_messages(messages)
