"""The objects that scenes are made of: pictures of Microsoft's Fluent Emoji (MIT) that a person can name at a glance.

Left out are signs, letters, people, and what a stranger could not tell apart at 60 pixels.
"""

from __future__ import annotations

_LIST = """
1f986 duck, 1f427 penguin, 1f989 owl, 1f9a9 flamingo, 1f99a peacock, 1f9a2 swan, 1f418 elephant, 1f405 tiger, 1f404
cow, 1f416 pig, 1f411 sheep, 1f992 giraffe, 1f407 rabbit, 1f422 turtle, 1f40d snake, 1f996 dinosaur, 1f40b whale,
1f420 fish, 1f419 octopus, 1f980 crab, 1f40c snail, 1f98b butterfly, 1f41e ladybug, 1f438 frog, 1f43c panda, 1f98a
fox, 1f43b bear, 1f981 lion, 1f428 koala, 1f435 monkey, 1f984 unicorn, 1f332 pine tree, 1f334 palm tree, 1f335 cactus,
1f337 tulip, 1f33b sunflower, 1f339 rose, 1f344 mushroom, 1fab4 potted plant, 1f34e apple, 1f34c banana, 1f34d
pineapple, 1f353 strawberry, 1f349 watermelon, 1f347 grapes, 1f352 cherries, 1f34b lemon, 1f350 pear, 1f951 avocado,
1f955 carrot, 1f33d corn cob, 1f966 broccoli, 1f346 eggplant, 1f354 hamburger, 1f355 pizza slice, 1f32d hot dog, 1f9c1
cupcake, 1f382 birthday cake, 1f369 doughnut, 1f366 ice cream cone, 1f36d lollipop, 1f950 croissant, 1f37a beer mug,
1fad6 teapot, 1f695 taxi, 1f68c bus, 1f692 fire engine, 1f6fb pickup truck, 2708-fe0f airplane, 1f681 helicopter,
1f680 rocket, 1f6f8 flying saucer, 26f5 sailboat, 1f30b volcano, 1f3e0 house, 1f3f0 castle, 26fa tent, 1f381 present,
1f388 balloon, 1f383 pumpkin, 26c4 snowman, 1f9f8 teddy bear, 1f916 robot, 1f47b ghost, 1f3b8 guitar, 1f941 drum,
1f4f7 camera, 1f4fa television, 23f0 alarm clock, 1f4a1 light bulb, 2602-fe0f umbrella, 1f451 crown, 1f45f sneaker,
1f392 backpack, 1f6cb-fe0f sofa, 1f3c6 trophy, 26bd soccer ball, 1f3c0 basketball, 2693 anchor, 1fa90 planet
"""

#: File name of the picture, without its ending, by the name of the object.
OBJECTS: dict[str, str] = {
    name: code for code, name in (entry.strip().split(" ", 1) for entry in _LIST.replace("\n", " ").split(",") if entry)
}
#: Those that the small SD3 draws. A transformer takes several times as long as a U-Net to learn what an object looks
#: like.
FEWER_OBJECTS = (
    *("duck", "penguin", "owl", "elephant", "tiger", "frog", "butterfly", "pine tree", "cactus", "sunflower", "rose"),
    *("apple", "banana", "hamburger", "bus", "fire engine", "airplane", "rocket", "sailboat", "castle", "robot"),
    *("balloon", "alarm clock", "umbrella"),
)
#: Objects that are more than one, which take no article.
PLURALS = frozenset({"grapes", "cherries"})


def with_article(name: str) -> str:
    """Return "a duck", "an owl", "grapes"; ``name`` may begin with an adjective."""
    if name.split()[-1] in PLURALS:
        return name
    # A vowel that sounds like a consonant: "a unicorn".
    vowel = name[0] in "aeiou" and not name.startswith("uni")
    return f"{'an' if vowel else 'a'} {name}"
