"""Four small tasks of English inflection: the past of verbs, the plural of nouns, the comparative of adjectives, and
the -ing form of verbs.

    python examples/inflections.py --out examples/smollm2/tasks

writes a folder for each with `train.jsonl` and `test.jsonl`. No verb is in a training part of one task of verbs and in
the test part of the other.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import tyro

from lorafusion_jax.report import write_text

# An irregular form stands behind a slash. A plus says that the final consonant is doubled.
VERBS = """
accept add admire admit+ agree allow amuse announce answer appear applaud arrive ask attack avoid bake balance beg+
behave belong blink boil borrow bounce bow breathe brush bump bury call camp care carry cause chase cheat cheer chew
choke clap+ clean climb collect comb compare complain confess connect copy cough count cover crash crawl cross cry
cure dance dare decide delay deliver depend describe deserve destroy die drag+ dress drill drop+ dry earn employ
empty enjoy enter escape examine expect explain fail fear fetch fill film fix flash float flood flow fold follow
form frame frighten fry gather gaze glue grab+ greet guard guess guide hammer hand happen harm hate heat help hope
hover hug+ hunt hurry imagine improve include inform invite jog+ join joke judge jump kick kiss knock knot+ land
laugh launch lick like list listen live load lock look love manage march mark marry match melt mend move muddle name
need nod+ note notice obey object observe obtain offer open order owe pack paddle paint park pass paste pause peel
peep permit+ phone pick pinch plan+ play please plug+ point polish pour pray prefer+ press pretend print produce
promise protect provide pull pump punch push question race rain raise reach receive record refuse regret+ rely
remain remember remind remove repair repeat replace reply report rescue rest return rinse risk rob+ roll rub+ ruin
sail save scare scream search seem serve settle share shelter shop+ shrug+ sigh sip+ skip+ slip+ smile sneeze snore
sound spill stare start stay step+ stir+ stitch stop+ store stretch suggest supply support suppose surprise switch
talk tap+ taste tease thank tie touch tour trade train treat trip+ trust try turn twist unite use vanish visit wait
walk wander want warm warn wash waste watch wave weigh whisper whistle wink wipe wish wonder work worry wrap+ yawn
yell zip+ be/was become/became begin+/began bend/bent bite/bit bleed/bled blow/blew break/broke bring/brought
build/built buy/bought catch/caught choose/chose come/came creep/crept cut+/cut deal/dealt dig+/dug draw/drew
drink/drank drive/drove eat/ate fall/fell feed/fed feel/felt fight/fought find/found flee/fled fly/flew
forget+/forgot forgive/forgave freeze/froze get+/got give/gave go/went grow/grew have/had hear/heard hide/hid
hit+/hit hold/held hurt/hurt keep/kept know/knew lay/laid lead/led leave/left lend/lent let+/let lose/lost make/made
mean/meant meet/met pay/paid put+/put read/read ride/rode ring/rang rise/rose run+/ran say/said see/saw seek/sought
sell/sold send/sent set+/set shake/shook shine/shone shoot/shot shut+/shut sing/sang sink/sank sit+/sat sleep/slept
slide/slid speak/spoke spend/spent spin+/spun spread/spread stand/stood steal/stole stick/stuck sting/stung
strike/struck swear/swore sweep/swept swim+/swam swing/swung take/took teach/taught tear/tore tell/told
think/thought throw/threw understand/understood wake/woke wear/wore weep/wept win+/won write/wrote
"""
NOUNS = """
actor address airport animal answer ant apple army arm artist aunt baby bag baker ball band bank basket bath beach
bean bear bed bee bell belt bench berry bird boat body bone book bottle box boy branch bridge brother brush bucket
bus bush butterfly button cake camera candle car card carrot castle cat chair cherry church circle city class clock
cloud coach coat coin colour comb computer cook country cow crab cross crown cup curtain daisy dancer day desk diary
dictionary dish doctor dog doll donkey door dragon dream dress drum duck eagle ear egg elephant engine eye face
factory fairy family farm father feather field finger fire flag flash flower fly forest fork fox friend frog game
garden gate ghost giraffe girl glass glove goat grape grass guitar hair hammer hand hat heart hen hill hobby horse
hospital hotel hour house island jacket jar jelly jewel judge jug key king kite kitten lady lake lamp leg lemon
letter library lily line lion lip lorry lunch machine map market mask match mirror monkey month moon mother mountain
mouth museum nail name neck nest net night nose number nurse ocean office onion orange orchard oven owl page palace
parrot party path peach pear pen pencil penny picture pig pilot pirate plane planet plate pocket pony pool prince
puppy queen rabbit radish ring river road robot rock roof room rose ruler sandwich school sea seat shark ship shirt
shoe shop sister sky snake sock song spoon spy squirrel stamp star station stone story strawberry street student
table tail teacher temple tent tiger town toy train tray tree turtle uncle valley village visitor wall wasp watch
whale wheel window wing wish witch word worm zebra calf/calves child/children foot/feet goose/geese half/halves
hero/heroes knife/knives leaf/leaves life/lives loaf/loaves man/men mouse/mice ox/oxen person/people potato/potatoes
sheep/sheep shelf/shelves tomato/tomatoes tooth/teeth wife/wives wolf/wolves woman/women
"""
ADJECTIVES = """
angry big+ black blue bold brave brief bright broad brown bumpy busy calm cheap chewy chilly clean clear clever
clumsy cold cool crazy creamy cruel curly cute damp dark deep dense dim+ dirty dry dull dusty early easy fair faint
fancy fast fat+ few fine firm fit+ flat+ fluffy fond foggy foolish/more_foolish fresh friendly full funny fuzzy
gentle giddy glad+ gloomy grand grassy greasy great greedy green grim+ hairy handy happy hard harsh healthy heavy
high hilly hot+ huge humble hungry icy itchy jolly juicy keen kind large late lazy light likely lively lonely long
loose loud lovely low lucky mad+ messy mild misty moist muddy narrow nasty naughty near neat new nice noble noisy
odd old pale plain plump polite poor pretty proud pure quick quiet rainy rare raw red+ rich ripe rosy rough round
rude rusty sad+ safe salty scary shaky shallow sharp shiny short silly simple sincere sleepy slim+ slow small smart
smooth soft sore sour spicy steady steep sticky stiff stormy strange strict strong sunny sweet tall tame tasty
tender thick thin+ thirsty tidy tight tiny tired/more_tired tough ugly vague vast warm wavy weak wealthy weary weird
wet+ white wide wild windy wise witty wooden/more_wooden worthy young bad/worse far/further good/better little/less
many/more afraid/more_afraid beautiful/more_beautiful boring/more_boring careful/more_careful careless/more_careless
cheerful/more_cheerful colourful/more_colourful comfortable/more_comfortable common/more_common curious/more_curious
dangerous/more_dangerous delicious/more_delicious difficult/more_difficult elegant/more_elegant
exciting/more_exciting expensive/more_expensive famous/more_famous generous/more_generous helpful/more_helpful
honest/more_honest important/more_important intelligent/more_intelligent interesting/more_interesting
jealous/more_jealous modern/more_modern nervous/more_nervous patient/more_patient peaceful/more_peaceful
pleasant/more_pleasant popular/more_popular powerful/more_powerful precious/more_precious serious/more_serious
stubborn/more_stubborn useful/more_useful useless/more_useless valuable/more_valuable
"""

# Rows of each task that test.
TEST_ROWS = 60
_VOWELS = "aeiou"


def tasks() -> dict[str, dict[str, str]]:
    """Return the word and its form for all rows of each task."""
    return {
        "past": _table(VERBS, _past),
        "plural": _table(NOUNS, _plural),
        "comparative": _table(ADJECTIVES, _comparative),
        "ing": _table(VERBS, lambda verb, stem, _: _ing(verb, stem)),
    }


def _table(words: str, form: Callable[[str, str, str], str]) -> dict[str, str]:
    """Return the form of every word: from the word, its stem (the final consonant doubled) and its irregular form."""
    found = {}
    for entry in words.split():
        marked, _, irregular = entry.partition("/")
        word = marked.rstrip("+")
        assert word not in found, word
        found[word] = form(
            word, word + word[-1] * marked.endswith("+"), irregular.replace("_", " ")
        )
    return found


def _past(verb: str, stem: str, irregular: str) -> str:
    if irregular:
        return irregular
    return stem + "d" if stem.endswith("e") else _y_to_i(stem) + "ed"


def _ing(verb: str, stem: str) -> str:
    if stem.endswith("ie"):
        return stem[:-2] + "ying"
    silent = (
        stem.endswith("e") and not stem.endswith(("ee", "oe", "ye")) and verb != "be"
    )
    return (stem[:-1] if silent else stem) + "ing"


def _plural(noun: str, stem: str, irregular: str) -> str:
    if irregular:
        return irregular
    hissing = noun.endswith(("s", "x", "z", "ch", "sh")) or _y_to_i(noun) != noun
    return _y_to_i(noun) + ("es" if hissing else "s")


def _comparative(adjective: str, stem: str, irregular: str) -> str:
    if irregular:
        return irregular
    return stem + "r" if stem.endswith("e") else _y_to_i(stem) + "er"


def _y_to_i(word: str) -> str:
    """Return the word with a final y after a consonant turned into i."""
    return word[:-1] + "i" if word.endswith("y") and word[-2] not in _VOWELS else word


def main(out: Path) -> None:
    """Write all tasks.

    Args:
      out: folder to write them to.
    """
    for name, rows in tasks().items():
        # The order depends on the words alone, so both tasks of verbs test on the same ones.
        order = sorted(rows)
        random.Random(0).shuffle(order)
        parts = {"test": order[:TEST_ROWS], "train": order[TEST_ROWS:]}
        for part, words in parts.items():
            lines = [
                json.dumps({"input": word, "target": rows[word]}) for word in words
            ]
            (out / name).mkdir(parents=True, exist_ok=True)
            write_text(out / name / f"{part}.jsonl", "\n".join(lines) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
