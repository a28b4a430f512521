"""Sentences of the synthetic corpora in official layouts: English over 500 words; Mandarin numbers, dates, places."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

PEOPLE = """man woman boy girl king queen doctor teacher farmer captain soldier sailor hunter baker singer painter
student lawyer judge priest servant stranger neighbor brother sister father mother uncle cousin friend child baby lady
gentleman officer writer reader driver fisher miller tailor merchant shepherd widow prince princess guest traveler
thief giant nurse clerk pilot cook gardener hero enemy prisoner beggar dancer poet sculptor wizard witch lord
""".upper().split()
NAMES = """john mary peter anna henry alice george emma william sarah thomas jane robert lucy edward helen charles grace
arthur martha""".upper().split()
THINGS = """table chair lamp clock mirror basket bottle blanket candle carpet bucket hammer needle pencil letter book
paper picture window door garden fence ladder wagon boat bridge tower castle church market school kitchen cellar
barn stable forest river valley mountain island harbor village city road path field meadow pond well stone box
key ring coin coat hat shoe glove scarf dress shirt pocket sword shield arrow drum violin piano flute bell cup plate
bowl spoon knife kettle loaf apple pear cherry onion carrot potato cheese butter honey sugar
roof chimney stair corner tunnel gate bench desk drawer curtain pillow towel soap comb purse wallet ticket map
compass anchor rope chain lock barrel crate cart wheel saddle bridle ribbon button thread cotton wool marble statue
fountain orchard desert canyon glacier beach cliff cave""".upper().split()
ANIMALS = """horse dog cat cow sheep goat pig hen duck goose rabbit fox wolf bear deer mouse bird eagle owl crow snake
frog fish bee spider""".upper().split()
VERBS = """found lost saw heard followed carried dropped bought sold painted mended cleaned watched liked wanted needed
took brought kept hid broke opened closed moved touched held pulled pushed lifted counted described remembered forgot
visited left reached crossed passed noticed admired feared loved hated blamed praised thanked greeted answered helped
taught warned called stopped""".upper().split()
GOING = """walked ran rode sailed climbed jumped hurried wandered traveled marched returned arrived waited rested slept
stood sat knelt worked played sang danced laughed cried shouted whispered smiled trembled vanished appeared
""".upper().split()
ADJECTIVES = """old young tall short rich poor happy sad angry quiet loud brave clever foolish gentle proud honest kind
strong weak heavy light dark bright warm cold wet dry clean dirty broken empty full new small large little great long
narrow wide deep high low round sharp soft hard smooth rough sweet bitter fresh green yellow brown white black gray
golden silver wooden strange famous secret lonely busy lazy tired hungry sleepy sudden ancient modern
frozen hidden polished""".upper().split()
ADVERBS = """slowly quickly quietly loudly gladly sadly often seldom always never soon again together alone early late
today yesterday suddenly carefully""".upper().split()
PREPOSITIONS = """near behind under above beside beyond across through around against before after inside outside toward
without""".upper().split()
TIMES = """morning evening night winter summer autumn spring monday tuesday friday sunday january april july october
noon midnight""".upper().split()
NUMBERS = """two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty hundred thousand
""".upper().split()
LINKS = "AND BUT BECAUSE WHILE UNTIL WHEN THOUGH SINCE".split()
SMALL = "THE A HIS HER THEIR OUR MY EVERY THIS THAT IN ON AT HAD VERY HE SHE THEY WE I".split()
VOCABULARY = frozenset(
    [*PEOPLE, *NAMES, *THINGS, *ANIMALS, *VERBS, *GOING, *ADJECTIVES, *ADVERBS, *PREPOSITIONS, *TIMES, *NUMBERS]
    + [*LINKS, *SMALL]
)
LENGTHS = range(4, 13)

DIGITS = "零一二三四五六七八九"
PLACES = """北京 上海 天津 重庆 广州 深圳 成都 武汉 南京 西安 杭州 苏州 青岛 大连 沈阳 长春 哈尔滨 济南 郑州 长沙
福州 厦门 昆明 贵阳 南宁 海口 兰州 银川 西宁 太原 合肥 南昌 石家庄 乌鲁木齐 呼和浩特 拉萨""".split()
WEEKDAYS = "一二三四五六日"


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _noun_phrase(rng: np.random.Generator) -> list[str]:
    kind = rng.random()
    if kind < 0.15:
        return [_pick(rng, NAMES)]
    if kind < 0.25:
        return [_pick(rng, ("HE", "SHE", "THEY", "WE", "I"))]
    return _object(rng, [*PEOPLE, *ANIMALS])


def _object(rng: np.random.Generator, nouns: Sequence[str]) -> list[str]:
    words = [_pick(rng, ("THE", "THE", "THE", "A", "HIS", "HER", "THEIR", "OUR", "MY", "EVERY", "THIS", "THAT"))]
    if rng.random() < 0.5:
        words += ["VERY"] * (rng.random() < 0.15) + [_pick(rng, ADJECTIVES)]
    return [*words, _pick(rng, nouns)]


def _clause(rng: np.random.Generator) -> list[str]:
    words = _noun_phrase(rng)
    kind = rng.random()
    if kind < 0.5:
        words += [_pick(rng, VERBS), *_object(rng, [*THINGS, *ANIMALS, *PEOPLE])]
    elif kind < 0.85:
        words += [_pick(rng, GOING), _pick(rng, PREPOSITIONS), *_object(rng, THINGS)]
    else:
        words += ["HAD", _pick(rng, NUMBERS), _pick(rng, ADJECTIVES), "AND", _pick(rng, ADJECTIVES), _pick(rng, THINGS)]
    if rng.random() < 0.3:
        words.append(_pick(rng, ADVERBS))
    if rng.random() < 0.2:
        words += [_pick(rng, ("IN", "ON", "AT", "SINCE")), "THAT", _pick(rng, TIMES)]
    return words


def english(rng: np.random.Generator) -> str:
    """A sentence of 4 to 12 words of ``VOCABULARY``, in capitals."""
    while True:
        words = _clause(rng)
        if len(words) < 7 and rng.random() < 0.5:
            words += [_pick(rng, LINKS), *_clause(rng)]
        if len(words) in LENGTHS:
            return " ".join(words)


def chinese_number(number: int) -> str:
    """0 to 9999 as it is said."""
    if number < 10:
        return DIGITS[number]
    said, skipped = "", False
    for unit, size in (("千", 1000), ("百", 100), ("十", 10), ("", 1)):
        digit = number // size % 10
        if digit == 0:
            skipped = bool(said)
            continue
        said += ("零" if skipped else "") + DIGITS[digit] + unit
        skipped = False
    return said.removeprefix("一") if said.startswith("一十") else said


def _date(rng: np.random.Generator) -> str:
    year = "".join(DIGITS[int(digit)] for digit in str(rng.integers(1950, 2030)))
    month, day = chinese_number(int(rng.integers(1, 13))), chinese_number(int(rng.integers(1, 29)))
    return f"{year}年{month}月{day}日" if rng.random() < 0.5 else f"{month}月{day}日星期{_pick(rng, WEEKDAYS)}"


def _journey(rng: np.random.Generator) -> str:
    first, second = rng.permutation(len(PLACES))[:2]
    how = _pick(rng, ("坐火车", "坐飞机", "开车", "坐船"))
    return f"{_pick(rng, ('我们', '他', '她', '老师', '朋友'))}从{PLACES[first]}{how}到{PLACES[second]}"


def _price(rng: np.random.Generator) -> str:
    goods = _pick(rng, ("票", "房间", "手机", "电脑", "衣服", "书", "水果", "茶"))
    return f"{_pick(rng, PLACES)}的{goods}要{chinese_number(int(rng.integers(10, 10000)))}元"


def _people(rng: np.random.Generator) -> str:
    count = chinese_number(int(rng.integers(2, 10000)))
    return f"{_pick(rng, PLACES)}今天来了{count}个{_pick(rng, ('学生', '客人', '工人'))}"


def _weather(rng: np.random.Generator) -> str:
    sky = _pick(rng, ("下雨", "下雪", "晴", "多云", "有风"))
    return f"{_pick(rng, PLACES)}{_date(rng)}{sky}气温{chinese_number(int(rng.integers(1, 40)))}度"


def mandarin(rng: np.random.Generator) -> str:
    """A sentence without spaces or punctuation, over more than a hundred characters."""
    if rng.random() < 0.25:
        return _weather(rng)
    makers: tuple[Callable[[np.random.Generator], str], ...] = (_journey, _price, _people)
    text = makers[int(rng.integers(len(makers)))](rng)
    return f"{_date(rng)}{text}" if rng.random() < 0.3 else text
