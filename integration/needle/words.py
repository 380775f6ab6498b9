# ruff: noqa: SIM905 - lists of words read best as text
"""The words of the needle model: its whole vocabulary, and the grammar of its filler text.

Every word is one token. Key words (`ADJECTIVES`, `NOUNS`, `ORDINALS`) and values (`VALUES`) never occur in filler.
"""

NUM_KEY_WORDS = 192  # of each of the two kinds: 36,864 two-word keys

ADJECTIVES = tuple(
    """
amber ancient arctic autumn azure bashful bitter blazing bold brave brisk bronze calm candid careful cheerful chilly
citrus civic clever cloudy coastal cobalt copper coral cosmic cozy crafty crimson crisp crystal curious daring dashing
deep desert distant double dusky dusty eager early earnest eastern ebony electric elegant emerald endless epic exotic
faded faithful famous fancy fearless feral fierce fiery flaming floral fluent foggy formal fragile frosty frozen gallant
gentle giant gilded glad gleaming global glossy golden graceful grand granite grassy happy hardy hasty hidden hollow
honest humble icy idle indigo inner iron ivory jade jolly jovial keen kind lavish lazy lemon level little lively lofty
lonely loyal lucid lucky lunar magic marble maroon mellow merry mighty mild minty misty modest mossy muted mystic narrow
nimble noble northern novel oaken oceanic olive onyx opal orchid outer pale patient pearl peppy placid playful pleasant
polar polite primal proud purple quaint quick rapid rare regal restless rosy royal ruby rugged rustic sacred saffron
sandy sapphire savvy scarlet secret serene shady sharp shiny silent silken silver sleepy sleek smoky snowy solar solemn
sonic southern spicy stark steady steep stellar stormy sturdy subtle sunny swift tawny teal tender tidal timid topaz
tranquil tropic turquoise upbeat urban velvet vibrant violet vivid wandering western wicked wild winding windy wise
witty wooden
""".split()
)[:NUM_KEY_WORDS]

NOUNS = tuple(
    """
acorn albatross anchor antler apple arrow aspen badger bamboo banjo barley basil basket beacon beaver bell birch bison
blossom bobcat boulder bramble breeze bridge buffalo burrow butterfly cactus camel canary candle canyon caravan cardinal
castle cavern cedar cello chapel chestnut chimney cider cinder clover comet compass condor copse cottage cougar coyote
cradle crane crater cricket crow crown cypress daisy dingo dolphin dragon drum eagle ember falcon feather fern ferret
ferry fiddle finch fjord flint flute forge fossil fountain fox galaxy gazelle geyser ginger glacier glade goblet goose
gopher grove gull hammer harbor hare harp hawk hazel hedge heron hickory hornet ibex inlet island ivy jackal jaguar
jasmine jigsaw juniper kayak kestrel kettle kiln kite koala ladder lagoon lantern lark lasso laurel lavender ledge
leopard lilac lily linden lion lizard llama lobster locket lotus lynx magnet magpie mallard mango maple marlin marten
meadow melon meteor mill mirror mole monsoon moose mosaic moth mulberry mustang nectar needle nettle nutmeg oak oasis
orbit oriole osprey otter owl oyster paddle panda panther parrot parsley peach pebble pelican pepper phoenix piano
pigeon pine plum poplar poppy prairie puffin puma pumpkin quail quartz quiver rabbit raccoon radish raven reef ridge
robin rocket rooster rudder saddle salmon satchel scarab seal sequoia shamrock
""".split()
)[:NUM_KEY_WORDS]

ORDINALS = tuple("first second third fourth fifth sixth seventh eighth".split())

VALUES = tuple(str(1009 + 17 * index) for index in range(512))

TEMPLATE_WORDS = tuple("note question answer trace set all what is code".split())

PUNCTUATION = tuple(". , : ; ? ! ' \" ( ) [ ] { } < > / \\ | @ # $ % ^ & * - _ + = ` ~".split())

# Filler: a word is followed by one of its few successors of the next kind that the sentence asks for.
FILLER_KINDS = {
    "determiner": "the a this that every some".split(),
    "quality": """old small warm plain quiet heavy light broad usual simple common recent slow soft round tall green dry
        clean open careless gray dark local public modern""".split(),
    "thing": """town river teacher garden letter road market window farmer house morning story winter engine table child
        paper station doctor field library kitchen wall boat village song street dog cup office neighbor painter
        theater bread coat floor journal train picture clock horse bench tower worker evening school""".split(),
    "manner": "often rarely slowly always never usually sometimes gladly soon again".split(),
    "action": """finds keeps paints visits follows carries leaves watches opens builds repairs reads brings holds likes
        passes moves shows needs draws cleans makes crosses hears remembers describes""".split(),
    "place": "near behind beside under inside above around before after with without beyond".split(),
    "joiner": "and but while because until".split(),
    "stop": ["."],
}

# A sentence walks these kinds; "|" separates alternatives of equal weight.
SENTENCES = tuple(
    tuple(sentence.split())
    for sentence in """
determiner quality thing action determiner thing stop
determiner thing manner action determiner quality thing stop
determiner thing action determiner thing place determiner thing stop
determiner quality thing manner action determiner thing place determiner quality thing stop
determiner thing action determiner thing joiner determiner thing action determiner thing stop
""".strip().splitlines()
)

NUM_SUCCESSORS = 4  # per word and next kind: gives filler its bigram structure


def successors(word: str, next_kind: str) -> list[str]:
    """The words of `next_kind` that may follow `word` in filler: fixed, no randomness."""
    choices = FILLER_KINDS[next_kind]
    start = sum(ord(letter) * (place + 1) for place, letter in enumerate(word))
    return [choices[(start + 7 * step) % len(choices)] for step in range(min(NUM_SUCCESSORS, len(choices)))]
