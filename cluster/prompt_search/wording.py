"""Other words for an instruction: keywords left out or replaced, and rewrites by rule.

Near words come from a small table and not from the neighbours of the teacher's embeddings: a table
holds whole words, where embeddings hold pieces of words, and needs no weights outside the teacher.
Like neighbours in an embedding, a group holds words used alike, opposites among them.
"""

import difflib
import re

NEAR = (
    "write give return say name state output print produce",
    "answer reply respond",
    "find identify pick choose select determine extract",
    "classify label sort categorise",
    "translate convert turn rewrite transform",
    "explain describe summarise",
    "first last second third final next middle",
    "longest shortest largest smallest biggest",
    "word term token letter number name colour animal phrase sentence",
    "question request query message input text line passage sentence",
    "answer reply response result output solution",
    "following given above below",
    "short brief concise exact precise correct right",
    "category class label intent topic kind type",
    "careful carefully exactly briefly only just",
    "every each all any",
    "expert assistant specialist teacher",
)
FUNCTION_WORDS = """
a an the this that these those it its is are was were be been do does did of in on at to from for
with by as and or but if then than so not no you your i we they he she what which who how please can
will should must may
"""
WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
LEAST_CHANGE = 0.2  # of the characters or of the words
MOST_GROWTH = 3.0  # times the length of the original
ROLE = "You are an expert. "
FORMS = {
    "polite": "Please {plain}.",
    "question": "Can you {plain}?",
    "role": ROLE + "{sentence}",
    "task": "Your task: {plain}.",
    "terse": "{sentence} Reply with the answer only.",
    "careful": "Read the text with care. {sentence}",
}


def content_words(instruction: str) -> list[str]:
    """The words that carry the meaning, in order, each once."""
    found = (
        word for word in WORD.findall(instruction) if word.lower() not in FUNCTION_WORDS.split()
    )
    return list(dict.fromkeys(found))


def without(instruction: str, word: str) -> str:
    """The instruction with every occurrence of a word left out."""
    return _tidy(_whole(word).sub("", instruction))


def near_words(word: str) -> list[str]:
    """Words used like this one, in a fixed order, in its case."""
    groups = [group.split() for group in NEAR if word.lower() in group.split()]
    others = dict.fromkeys(near for group in groups for near in group if near != word.lower())
    return [near.capitalize() if word[0].isupper() else near for near in others]


def replaced(instruction: str, word: str, other: str) -> str:
    """The instruction with another word in place of every occurrence of one."""
    return _whole(word).sub(lambda _: other, instruction)


def rewrites(instruction: str) -> dict[str, str]:
    """Rewrites by rule, by the name of the rule; for teachers too weak to paraphrase."""
    sentence = _tidy(instruction)
    plain = sentence.rstrip(".!?")
    plain = plain[:1].lower() + plain[1:]
    made = {name: form.format(plain=plain, sentence=sentence) for name, form in FORMS.items()}
    if (swapped := _clauses_swapped(sentence)) is not None:
        made["order"] = swapped
    return {name: text for name, text in made.items() if text != instruction}


def acceptable(rewrite: str, original: str) -> bool:
    """Whether a paraphrase says something, at a sensible length, and is another text."""
    text, words = _tidy(rewrite), WORD.findall(rewrite.lower())
    if len(words) < 2 or "\n" in rewrite.strip():
        return False
    if not len(original) / MOST_GROWTH <= len(text) <= len(original) * MOST_GROWTH:
        return False
    if len(set(words)) < 0.5 * len(words):
        return False  # it goes round in circles
    return max(edit_distance(text, original), word_distance(text, original)) >= LEAST_CHANGE


def edit_distance(one: str, other: str) -> float:
    """Share of the characters that differ, 0 to 1."""
    return 1.0 - difflib.SequenceMatcher(None, one.lower(), other.lower(), False).ratio()


def word_distance(one: str, other: str) -> float:
    """Share of the words of both that only one of them has, 0 to 1."""
    words = [set(WORD.findall(text.lower())) for text in (one, other)]
    union = words[0] | words[1]
    return 1.0 - len(words[0] & words[1]) / len(union) if union else 0.0


def _clauses_swapped(sentence: str) -> str | None:
    """Two sentences, or a condition and what it is for, the other way round."""
    sentences = re.findall(r"[^.!?]+[.!?]", sentence)
    if len(sentences) > 1:
        return " ".join(part.strip() for part in [*sentences[1:], sentences[0]])
    found = re.fullmatch(r"((?:If|When|For|From|In|Given) [^,]+), ([^.]+)\.?", sentence)
    if found:
        condition, order = found.groups()
        return f"{order[0].upper()}{order[1:]} {condition[0].lower()}{condition[1:]}."
    return None


def _whole(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w'-]){re.escape(word)}(?![\w'-])")


def _tidy(text: str) -> str:
    text = re.sub(r"\s+", " ", text)
    return re.sub(r" ([.,;:!?])", r"\1", text).strip()
