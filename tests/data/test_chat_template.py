"""Chat templates: named ones, those that read parts, those that lose text, and those that fail with anything."""

import pytest

from fastsae.data import tokens
from fastsae.data.chat_template import ChatTemplate, RefusedDialogueError
from fastsae.errors import UsageError
from tests.data.test_sequencing import GEMMA, LLAMA, QWEN, chat, make_tokenizer

PARTS = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
PARTS += "{% endfor %}{% endfor %}"
FIRST_PART = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'][0]['text'] + '|' }}{% endfor %}"
BOTH = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}"
)
BOTH += "{% endfor %}{% endif %}{% endfor %}"
SAID = chat("ask", "answer")


def template(text):
    return ChatTemplate(make_tokenizer("qwen", template=text))


@pytest.mark.parametrize("text", [QWEN, LLAMA, GEMMA, BOTH])
def test_content_is_a_string_where_a_template_takes_that(text):
    tokenizer = make_tokenizer("qwen", template=text)
    found = ChatTemplate(tokenizer)
    assert not found.takes_parts
    assert found.lost_roles == ()
    assert found.text(SAID) == tokenizer.apply_chat_template(SAID, tokenize=False)


@pytest.mark.parametrize("content", ["{{ m.content }}", "{{ m.content | string | trim }}"])
@pytest.mark.parametrize("in_parts", [("user",), ("assistant",), ("system", "user"), ("system",)])
def test_some_roles_take_parts_and_others_a_string(in_parts, content):
    loop = "{% for p in m.content %}{{ p.text }}{% endfor %}"
    text = f"{{% for m in messages %}}<{{{{ m.role }}}}>{{% if m.role in {in_parts} %}}{loop}{{% else %}}{content}"
    found = template(text + "{% endif %}{% endfor %}")
    assert found.parts_of == in_parts
    system = [{"role": "system", "content": "rules"}]
    assert found.text([*system, *SAID]) == "<system>rules<user>ask<assistant>answer"
    assert found.lost_roles == ()


@pytest.mark.parametrize(
    ("text", "expected"), [(PARTS, "<user>ask<assistant>answer"), (FIRST_PART, "<user>ask|<assistant>answer|")]
)
def test_content_is_parts_where_a_template_reads_those(text, expected):
    assert template(text).takes_parts
    assert template(text).text(SAID) == expected
    tokenizer = make_tokenizer("qwen", template=text)
    assert tokenizer.decode(tokens.render(tokenizer, SAID)) == expected


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}", "system"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "system, assistant"),
        ("{{ messages[-1].content }}", "system, user, assistant"),
    ],
)
def test_a_template_that_leaves_text_out_is_named(text, lost, caplog):
    with caplog.at_level("WARNING", "fastsae"):
        template(text).warn_of_lost_text()
    assert f"leaves out text of these roles: {lost};" in caplog.text


def test_a_template_that_loses_nothing_gives_no_warning(caplog):
    with caplog.at_level("WARNING", "fastsae"):
        template(QWEN).warn_of_lost_text()
        template(GEMMA).warn_of_lost_text()  # refuses system turns, which is counted where it happens
    assert caplog.text == ""


@pytest.mark.parametrize(
    "text", ["{% for m in messages %}<{{ m.role }}>{% endfor %}", "hello", "{{ messages[0].text }}"]
)
def test_a_template_that_writes_no_text_is_refused(text):
    with pytest.raises(UsageError, match=r"chat template of .* writes nothing of what a dialogue says"):
        template(text)


def test_a_template_that_is_not_valid_is_refused():
    with pytest.raises(UsageError, match=r"chat template of .* is not valid: .* in line 2"):
        template("a\n{% for m in messages %}")


@pytest.mark.parametrize(
    "code",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 'x' * 10_000_000_000 }}",
        "{{ 'x' * 0xFFFFFFFFFF }}",
        "{{ 'x' | center(1e10 | int) }}",
        "{% set n = 9 %}{{ 'x' * n ** 12 }}",
        "{{ 'x' * " + "9" * 400 + " }}",
    ],
)
def test_a_template_that_would_fill_the_memory_is_refused(code):
    with pytest.raises(UsageError, match=r"the chat template of .* expected no powers and no numbers above 1,000,000"):
        template(QWEN + code)


def test_numbers_and_options_of_ordinary_templates_are_allowed():
    code = "{% macro w(a, b) %}{{ a }}{% endmacro %}{% set o = {'a': 1, 'b': 2} %}{{ w(**o) }}{{ '-' * 3 }}{{ 2 * 500_000 }}"
    assert template(QWEN + code).text(SAID).endswith("1---1000000")
    assert template(QWEN + "10 ** 10 and 99999999").text(SAID).endswith("10 ** 10 and 99999999")


def test_named_templates():
    tokenizer = make_tokenizer("qwen")
    tokenizer.chat_template = {"tool_use": "{{ tools }}", "default": QWEN}
    assert ChatTemplate(tokenizer).text(SAID) == template(QWEN).text(SAID)
    tokenizer.chat_template = {"rag": QWEN}
    assert ChatTemplate(tokenizer).text(SAID) == template(QWEN).text(SAID)
    for several in ({"tool_use": QWEN, "rag": QWEN}, [{"name": n, "template": QWEN} for n in ("tool_use", "rag")]):
        tokenizer.chat_template = several
        with pytest.raises(UsageError, match="none of them is named 'default': 'rag', 'tool_use'"):
            ChatTemplate(tokenizer)
    tokenizer.chat_template = {}
    with pytest.raises(UsageError, match="has no chat template"):
        ChatTemplate(tokenizer)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("{{ m.nothing | tojson }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ m.nothing.deeper }}", "UndefinedError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
        ("{{ 'a'.index('b') }}", "ValueError"),
        ("{{ ''.__class__.mro }}", "SecurityError"),
        ("{{ '%d' % 'a' }}", "TypeError"),
    ],
)
def test_whatever_a_template_raises_is_a_refusal_without_the_dialogues_text(code, kind):
    found = template(
        "{% for m in messages %}{% if m.role == 'tool' %}" + code + "{% endif %}{{ m.content }}{% endfor %}"
    )
    assert found.text(SAID) == "askanswer"
    with pytest.raises(RefusedDialogueError, match=f"with the roles user, assistant, tool: {kind}") as caught:
        found.text([*SAID, {"role": "tool", "content": "42"}])
    assert caught.value.reason == f"the chat template raised an error ({kind})"


def test_what_a_template_refuses_itself():
    with pytest.raises(RefusedDialogueError, match="must alternate") as caught:
        template(GEMMA).text(chat("a")[:1] * 2)
    assert caught.value.reason == "the chat template refused it"
    with pytest.raises(RefusedDialogueError):
        template(QWEN).text([])


def test_lone_surrogates_are_replaced():
    assert template("{% for m in messages %}{{ m.content }}{% endfor %}").text(chat("a \ud83d", "b")) == "a \ufffdb"
