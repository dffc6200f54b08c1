"""The phrasings of the demo dialogues. Fields: {n} name, {m} module, {s} short name, {k} kind, {a} argument, {t} text.

No phrase reaches 20 words in a row without a field, so that 20-gram deduplication never drops a dialogue for its
phrasing alone.
"""

from __future__ import annotations

from typing import NamedTuple


class Phrases(NamedTuple):
    """The phrasings of a kind of turn: as the first question of a dialogue, as a follow-up, and of its answer."""

    first: list[str]
    follow: list[str]
    answer: list[str]


SYSTEM = [
    "You are a helpful assistant for Python programmers.",
    "You answer questions about Python libraries.",
    "You are a documentation assistant. Quote the documentation where you can.",
    "Answer briefly and precisely.",
    "You are a patient Python tutor.",
    "You know the Python standard library, PyTorch and NumPy well.",
    "You help people to read API documentation.",
    "Be concise. Use backticks for names of code.",
    "You are a coding assistant inside an editor.",
    "You are an expert in scientific Python.",
    "Answer in full sentences and stay with the facts.",
    "You are a friendly assistant who explains code.",
]
OPENERS = [""] * 8 + [
    "Hi! ", "Hello. ", "Quick question: ", "I'm reading some code. ", "Hey! ", "I'm new to this. ",
    "Sorry, a simple one: ", "One question. ", "For a project at work: ", "Please help: ",
]  # fmt: skip

OVERVIEW = {
    "module": [
        "What is the module {n} for?", "What does the {n} module do?", "Tell me about {n}.", "What is {n}?",
        "Can you describe the {n} module?", "When would I use {n}?", "Explain the purpose of {n}.",
        "I saw `import {n}`. What is it?", "Give me an overview of {n}.", "What can I do with {n}?",
        "What's inside {n}?", "Describe {n} in a few sentences.", "Why would someone import {n}?",
        "Could you summarise the documentation of {n}?", "What does the documentation say about {n}?",
        "What is the idea behind {n}?", "Introduce me to the {n} module.", "What problem does {n} solve?",
    ],
    "class": [
        "What is {n}?", "What does the class {n} do?", "What is the class {s} in {m} for?", "Tell me about {n}.",
        "Can you explain {n}?", "What is a {s} in {m}?", "When should I use {n}?", "What does {s} represent?",
        "Describe the class {n}.", "What are {s} objects used for in {m}?", "I found {n}. What is it?",
        "Explain the class {s} from {m}.", "What is the role of {n}?", "Could you summarise what {n} does?",
        "What does the docstring of {n} say?", "How would you describe {s} from the {m} module?",
        "Why does {m} have a class {s}?", "What do I get when I create a {s}?", "What's the purpose of {n}?",
        "Please explain {n} to me.",
    ],
    "property": [
        "What is {n}?", "What does the property {s} of {n} hold?", "What does {n} give me?", "Explain {n}.",
        "What can I read from {n}?", "What is stored in {n}?", "Tell me about the attribute {n}.",
        "What value does {n} have?", "What is the meaning of {n}?", "Could you explain the property {n}?",
    ],
    "function": [
        "What does {n} do?", "What is {n} for?", "Can you explain {n}?", "Explain the {k} {n}.",
        "Tell me about {n}.", "How does {n} work?", "What happens when I call {n}?", "When should I use {n}?",
        "Describe {n}.", "What is the purpose of {n}?", "What does `{n}` do exactly?",
        "I saw a call of {n}. What does it do?", "What does {s} in {m} do?", "In {m}, what is {s} for?",
        "Could you summarise {n}?", "What's {n}?", "What does the documentation say about {n}?",
        "Why would I call {n}?", "Please explain {n} to me.", "Help me understand {n}.", "What is the job of {n}?",
        "Give me a short description of {n}.", "What can I do with {n}?",
        "Could you tell me what {s} from {m} does?", "What does calling {n} do?",
        "How would you explain {n} to a colleague?", "Do you know {n}?", "Remind me what {n} does.",
    ],
}  # fmt: skip
OVERVIEW["method"] = OVERVIEW["function"]

OVERVIEW_ANSWER = [
    "{t}", "{t}", "{t}", "`{n}` is a {k} in the module `{m}`. {t}", "`{s}` is a {k} of `{m}`. {t}", "`{n}`: {t}",
    "The documentation of `{n}` says: {t}", "In short: {t}", "Sure. {t}", "It is a {k} from `{m}`. {t}",
    "`{s}` belongs to `{m}`. {t}", "Here is what `{n}` is for. {t}", "That is a {k} in `{m}`. {t}",
    "From the docstring of `{s}`: {t}", "According to the documentation of `{m}`: {t}", "Of course. {t}",
    "This {k} is documented like this: {t}", "`{n}` can be described so: {t}",
]  # fmt: skip

SIGNATURE = Phrases(
    first=[
        "What is the signature of {n}?", "How do I call {n}?", "Which arguments does {n} accept?",
        "Show me the signature of {n}.", "What parameters does {n} have?",
        "What are the defaults of the arguments of {n}?", "How is {n} called?",
        "What does the call of {n} look like?", "Which parameters can I pass to {n}?",
        "What do I have to pass to {n}?", "Give me the signature of {s} in {m}.", "How is {n} declared?",
        "How many arguments does {n} take?",
    ],
    follow=[
        "And what is its signature?", "How do I call it?", "Which arguments does it accept?",
        "What parameters does it have?", "Can you show me the signature?", "And how is it called?",
        "What do I have to pass?", "How is it declared?", "What does the call look like?",
        "Does it take any arguments?", "And its parameters?", "Which defaults does it have?",
    ],
    answer=[
        "The signature is `{t}`.", "You call it as `{t}`.", "`{t}`", "It is declared as `{t}`.",
        "This is its signature: `{t}`.", "Like this: `{t}`.", "The call looks like this: `{t}`.", "It is `{t}`.",
    ],
)  # fmt: skip
ARGUMENTS = Phrases(
    first=[
        "What do the arguments of {n} mean?", "Explain the parameters of {n}.", "Which arguments does {n} take?",
        "What are the parameters of {n}?", "Can you describe the arguments of {n}?", "What can I pass to {n}?",
        "What does each argument of {n} do?", "Tell me about the parameters of {s} in {m}.",
        "What inputs does {n} need?", "How do I set the arguments of {n}?", "Which options does {n} have?",
        "Document the arguments of {n} for me.",
    ],
    follow=[
        "What do its arguments mean?", "Which arguments does it take?", "And the parameters?",
        "What are its parameters?", "Can you explain the arguments?", "What can I pass to it?",
        "And what does each argument do?", "What inputs does it need?", "Which options does it have?",
        "Tell me about its arguments.", "What about the parameters?", "How do I set its arguments?",
    ],
    answer=[
        "{t}", "Its arguments are:\n{t}", "The parameters of `{s}`:\n{t}", "The documentation lists these:\n{t}",
        "These are the arguments.\n{t}", "`{s}` takes the following arguments.\n{t}",
    ],
)  # fmt: skip
MORE_ARGUMENTS = Phrases(
    first=[
        "Which further arguments does {n} have?", "What other parameters does {n} take?",
    ],
    follow=[
        "And the other arguments?", "What about the rest?",
    ],
    answer=ARGUMENTS.answer,
)  # fmt: skip
ARGUMENT = Phrases(
    first=[
        "What is the argument {a} of {n}?", "What does the {a} argument of {n} do?",
        "What should I pass as {a} to {n}?", "What is {a} in {n}?", "Explain the parameter {a} of {n}.",
        "In {n}, what does `{a}` mean?", "What type is {a} in {n}?", "How do I use the {a} parameter of {n}?",
        "What is `{a}` good for in {n}?", "When do I need {a} in {n}?", "What does {a} control in {n}?",
        "Can you explain `{a}` of {n}?",
    ],
    follow=[
        "What is the argument {a}?", "And what does {a} do?", "What should I pass as {a}?", "What does `{a}` mean?",
        "And `{a}`?", "Explain the parameter {a}, please.", "What is {a} for?", "How do I use {a}?",
        "What about {a}?", "Can you say more about `{a}`?", "What does {a} control?",
    ],
    answer=[
        "The argument `{a}` of `{s}`: {t}", "`{a}`: {t}", "In `{n}`, `{a}` means: {t}",
        "The documentation describes `{a}` as: {t}",
    ],
)  # fmt: skip
RETURNS = Phrases(
    first=[
        "What does {n} return?", "What is the return value of {n}?", "What do I get back from {n}?",
        "What comes out of {n}?", "Which value does {n} return?", "What type does {n} return?",
        "What is the result of {n}?", "What is returned by {n}?", "Can you tell me what {s} in {m} returns?",
        "What should I expect as the result of {n}?", "What is the output of {n}?",
    ],
    follow=[
        "And what does it return?", "What is its return value?", "What do I get back?", "And the result?",
        "What comes out?", "What does it give me back?", "Does it return something?", "What type does it return?",
        "What is the output?", "And what is returned?", "What should I expect as the result?",
        "What about the return value?",
    ],
    answer=[
        "It returns {t}", "`{s}` returns: {t}", "The return value is described as: {t}", "The result: {t}", "{t}",
        "You get back {t}", "The documentation says about the result: {t}", "`{n}` gives you: {t}",
    ],
)  # fmt: skip
ERRORS = Phrases(
    first=[
        "Which errors does {n} raise?", "When does {n} fail?", "What exceptions can {n} raise?",
        "What can go wrong in {n}?", "Which exceptions should I catch around {n}?", "Why does {n} raise an error?",
        "Does {n} raise exceptions?", "What errors should I expect from {n}?",
        "In which cases does {n} raise an exception?",
    ],
    follow=[
        "Which errors can it raise?", "And when does it fail?", "What exceptions should I expect?",
        "What can go wrong?", "Does it raise exceptions?", "And errors?", "What happens with a wrong argument?",
        "Which exceptions should I catch?", "What about errors?", "Can it fail?",
    ],
    answer=[
        "It raises {t}.", "`{s}` can raise {t}.", "`{n}` raises {t}.", "Yes, {t}.",
    ],
)  # fmt: skip
DOCUMENTED_ERRORS = Phrases(
    first=ERRORS.first,
    follow=ERRORS.follow,
    answer=[
        "{t}",
    ],
)  # fmt: skip
MESSAGE = [
    "I get the error \"{t}\". Where does it come from?", "What raises \"{t}\"?", "Which function says \"{t}\"?",
    "My program stops with \"{t}\". Why?", "Where can the message \"{t}\" come from?", "Who raises \"{t}\" in {m}?",
]  # fmt: skip
MESSAGE_ANSWER = [
    "That {x} is raised by `{n}`.", "`{n}` raises this {x}.", "It is a {x} from `{n}` in the module `{m}`.",
    "This message comes from `{n}`, which raises {x}.", "`{s}` in `{m}` raises a {x} with this text.",
]  # fmt: skip
EXAMPLE = Phrases(
    first=[
        "Show me an example of {n}.", "How do I use {n}?", "Can you give me an example for {n}?",
        "How is {n} used in practice?", "What does code with {n} look like?",
        "Give me a code example of {s} from {m}.", "Do you have an example with {n}?", "Please show how to use {n}.",
        "I'd like to see {n} in use.", "Show some code that uses {n}.",
    ],
    follow=[
        "Can you show me an example?", "How is it used?", "Give me an example, please.",
        "What does that look like in code?", "Do you have some code?", "An example would help.",
        "Show me how to use it.", "And in code?", "Can I see it in use?",
    ],
    answer=[
        "Here is an example:\n```python\n{t}\n```", "```python\n{t}\n```",
        "The documentation of `{s}` shows this:\n```python\n{t}\n```", "For instance:\n```python\n{t}\n```",
        "This is how it is used:\n```python\n{t}\n```", "Yes:\n```python\n{t}\n```",
    ],
)  # fmt: skip
MORE = Phrases(
    first=[
        "What else should I know about {n}?", "Tell me more about {n}.", "What are the details of {n}?",
        "Are there notes in the documentation of {n}?", "I know the basics of {n}. What else?",
        "Say more about {s} in {m}.", "What should I keep in mind with {n}?", "How does {n} behave in detail?",
        "What are the finer points of {n}?", "Can you go deeper on {n}?",
        "What does the long description of {n} say?", "Is there anything special about {n}?",
    ],
    follow=[
        "Tell me more.", "What else should I know?", "Can you go into detail?", "Anything else?", "Go on.",
        "And in detail?", "Is there more to it?", "Please continue.", "What should I keep in mind?",
        "Are there any notes?", "What are the details?", "Could you elaborate?", "Can you say more?",
        "I see. And what else?", "Thanks. Is there anything special about it?",
    ],
    answer=[
        "{t}", "{t}", "{t}", "{t}", "{t}", "{t}", "The documentation adds: {t}", "Further: {t}", "Yes. {t}",
        "About `{s}` it also says: {t}", "In detail: {t}", "Note the following. {t}", "On `{n}`: {t}",
    ],
)  # fmt: skip
MEMBERS = {
    "module": Phrases(
        first=[
            "What is defined in {n}?", "Which functions does {n} have?", "List the contents of {n}.",
            "What does {n} export?", "Which names does the module {n} define?", "What can I import from {n}?",
            "Which functions and classes are in {n}?",
        ],
        follow=[
            "What does it define?", "Which functions does it have?", "What can I import from it?",
            "And what is in it?",
        ],
        answer=[
            "`{n}` defines {t}.", "There are {t}.", "You will find {t} in `{n}`.", "It defines {t}.", "These: {t}.",
        ],
    ),
    "class": Phrases(
        first=[
            "Which methods does {n} have?", "List the methods of {n}.", "What can I call on a {s}?",
            "Which methods does {s} in {m} define?", "What operations does {n} offer?",
            "What methods are there on {n} objects?", "What can a {s} do?",
        ],
        follow=[
            "Which methods does it have?", "What can I call on it?", "And its methods?",
            "Which operations does it have?",
        ],
        answer=[
            "`{n}` defines {t}.", "There are {t}.", "You will find {t} in `{n}`.", "It defines {t}.", "These: {t}.",
        ],
    ),
}  # fmt: skip
BASES = Phrases(
    first=[
        "What does {n} inherit from?", "What is the base class of {n}?", "Which classes does {n} derive from?",
    ],
    follow=[
        "What does it inherit from?", "And its base class?", "Which class does it derive from?",
    ],
    answer=[
        "`{s}` inherits from {t}.", "It derives from {t}.", "The base of `{s}` is {t}.", "{t}.",
    ],
)  # fmt: skip
WHICH = [
    "Which {k} does this: {t}", "I'm looking for something with this description: {t}",
    "What is this the description of? {t}", "Which part of {p} is documented like this? {t}",
    "I need this: {t} What should I use?", "Name the {k}: {t}", "Which module has a {k} like this? {t}",
    "Where do I find this in {p}? {t}", "What is it called? {t}",
]  # fmt: skip
WHICH_ANSWER = [
    "That is `{n}`.", "You are looking for `{n}` in the module `{m}`.", "It is called `{s}` and lives in `{m}`.",
    "This describes `{n}`, a {k} of `{m}`.", "Use `{n}`.", "`{n}` does that.",
    "The {k} is `{s}`, in the module `{m}`.",
]  # fmt: skip
SIBLING_FOLLOW = [
    "And what does {s} do?", "And {s}?", "What about {s}?", "What is {s} in the same module?", "How about {s}?",
    "And {s}, what is that for?", "Then what does {s} do?", "Is {s} similar?", "What does {s} do, then?",
    "OK. And {s}?", "Thanks! And what is {s} for?", "Next one: {s}.",
]  # fmt: skip
