//! What the talks are made of.

/// Things to buy.
pub const ITEMS: &[&str] = &[
    "olive oil",
    "brown rice",
    "cheddar",
    "tomatoes",
    "yoghurt",
    "honey",
    "walnuts",
    "salmon",
    "flour",
    "lemons",
    "spinach",
    "butter",
    "oatmeal",
    "mustard",
    "apples",
    "garlic",
    "peanut butter",
    "eggs",
    "vinegar",
    "chicken",
    "noodles",
    "mushrooms",
    "raisins",
    "cinnamon",
    "lentils",
    "bananas",
    "coffee",
    "jam",
    "cabbage",
    "shrimp",
    "ginger",
    "tofu",
    "dates",
    "grapes",
    "pepper",
    "almonds",
    "turkey",
    "onions",
    "sugar",
    "potatoes",
];

/// Things, and where they are.
pub const PLACES: &[(&str, &str)] = &[
    ("a judge", "courtroom"),
    ("a surgeon", "hospital"),
    ("a pillow", "bedroom"),
    ("a cash machine", "bank"),
    ("a stove", "kitchen"),
    ("a goal keeper", "football field"),
    ("a librarian", "library"),
    ("a conductor's baton", "concert hall"),
    ("a blackboard", "classroom"),
    ("a runway", "airport"),
    ("an anchor", "ship"),
    ("a haystack", "farm"),
    ("a lion in a cage", "zoo"),
    ("a pew", "church"),
    ("a camel", "desert"),
    ("a lighthouse", "coast"),
    ("a treadmill", "gym"),
    ("a popcorn machine", "cinema"),
    ("a stamp", "post office"),
    ("a penguin", "south pole"),
    ("a mummy", "museum"),
    ("a shampoo bottle", "bathroom"),
    ("a ticket inspector", "train"),
    ("an acorn", "oak tree"),
];

/// Things, and what they are for.
pub const USES: &[(&str, &str)] = &[
    ("an umbrella", "staying dry"),
    ("a hammer", "driving nails"),
    ("a thermometer", "measuring heat"),
    ("a needle", "sewing"),
    ("a telescope", "watching stars"),
    ("a broom", "sweeping floors"),
    ("a key", "opening doors"),
    ("a corkscrew", "opening wine"),
    ("a compass", "finding north"),
    ("a stethoscope", "hearing hearts"),
    ("a calendar", "knowing the date"),
    ("a ladder", "reaching high places"),
    ("a kettle", "boiling water"),
    ("a saddle", "riding horses"),
    ("a parachute", "jumping from planes"),
    ("a wallet", "carrying money"),
    ("a rake", "gathering leaves"),
    ("a scale", "weighing things"),
    ("a snorkel", "breathing under water"),
    ("an iron", "smoothing shirts"),
    ("an alarm clock", "waking up"),
    ("a microphone", "being heard"),
    ("a candle", "giving light"),
    ("a net", "catching fish"),
];

/// What people do, and what is said of them.
pub const ACTIVITIES: &[(&str, &str)] = &[
    ("is very tired", "goes to sleep"),
    ("is hungry", "eats a meal"),
    ("has a toothache", "sees a dentist"),
    ("has lost a key", "searches the pockets"),
    ("feels cold", "puts on a coat"),
    ("wants to learn", "studies"),
    ("is late", "hurries"),
    ("hears a joke", "laughs"),
    ("is thirsty", "drinks water"),
    ("has broken a plate", "picks up the pieces"),
    ("is lost in a city", "asks for the way"),
    ("has won a prize", "celebrates"),
    ("is moving house", "packs boxes"),
    ("runs out of money", "looks for work"),
    ("wants a letter to arrive", "buys a stamp"),
    ("has a garden", "waters the flowers"),
    ("sees smoke", "calls the fire brigade"),
    ("is afraid of heights", "stays on the ground"),
    ("catches a cold", "stays in bed"),
    ("has a birthday", "blows out candles"),
];

/// Who comes to visit.
pub const VISITORS: &[&str] = &[
    "sister",
    "uncle",
    "teacher",
    "neighbour",
    "grandmother",
    "cousin",
    "boss",
    "brother",
    "nephew",
    "doctor",
    "landlord",
    "aunt",
];

/// Where there is dinner.
pub const RESTAURANTS: &[&str] = &[
    "Golden Dragon",
    "Blue Lagoon",
    "Old Mill",
    "Red Lantern",
    "Harbour View",
    "Silver Spoon",
    "Green Olive",
    "White Swan",
    "Black Forest",
    "Royal Oak",
];

/// What is given.
pub const PRESENTS: &[&str] = &[
    "a silk scarf",
    "two theatre tickets",
    "an old map",
    "a leather wallet",
    "six crystal glasses",
    "some orchids",
    "a chess board",
    "an electric guitar",
    "a cookery book",
    "a wooden clock",
];

/// What is said in between, and what is said to it.
pub const SMALL_TALK: &[(&str, &str)] = &[
    (
        "It has been raining since the morning.",
        "Then take your umbrella when you go out.",
    ),
    (
        "My bicycle has a flat tyre.",
        "There is a shop around the corner that mends wheels.",
    ),
    (
        "I could not sleep last night.",
        "A cup of warm milk before bed may help.",
    ),
    (
        "The film on television was very long.",
        "Three hours are too much for a film.",
    ),
    (
        "I have started to learn the piano.",
        "With half an hour a day you will soon play well.",
    ),
    (
        "My computer is so slow today.",
        "Have you tried to switch it off and on again?",
    ),
    (
        "The bus was full this morning.",
        "You could walk to work when the weather is fine.",
    ),
    (
        "I have eaten too much cake.",
        "A little walk would be good for your stomach.",
    ),
    (
        "Our cat has caught a mouse.",
        "What a brave animal you have at home.",
    ),
    (
        "The roses in the garden are in bloom.",
        "They must smell wonderful in the evening.",
    ),
    (
        "I need new shoes for the winter.",
        "Look for a pair that keeps out the snow.",
    ),
    (
        "The exam is in three weeks.",
        "Then there is still time to study.",
    ),
    (
        "I think I have a cold.",
        "Stay in bed and drink a lot of tea.",
    ),
    (
        "Somebody has painted our fence yellow.",
        "That is a cheerful colour for a fence.",
    ),
    (
        "My phone fell into the water.",
        "Put it into a bag of rice over night.",
    ),
    (
        "The match ended without a goal.",
        "Neither team deserved to win then.",
    ),
    (
        "I am looking for a quiet place to read.",
        "The library has armchairs on the second floor.",
    ),
    (
        "Bread has become so expensive.",
        "You could bake your own at home.",
    ),
];
