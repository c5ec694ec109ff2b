"""Word lists, proverbs and small multilingual grammars for the generators.

Written for this project, except for the proverbs (traditional) and the passages (public domain).
"""

from __future__ import annotations


def _words(text: str, sep: str | None = None) -> list[str]:
    return text.split(sep)


FIRST_NAMES = _words(
    "Alice Bob Carol David Emma Frank Grace Henry Isabel Jack Karen Liam Maria Noah Olivia Peter "
    "Quentin Rose Samuel Tina Ursula Victor Wendy Xavier Yvonne Zoe Anna Ben Clara Daniel Eva "
    "Felix Hannah Ivan Julia Kevin Laura Max Nina Oscar Paul Rachel Sarah Thomas Vera Walter "
    "John Mary James Robert Michael William Linda Elizabeth Susan Lucy Tom Tim George Amir "
    "Fatima Yuki Kenji Mei Wei Priya Arjun Aisha Omar Lena Sven Ingrid Pablo Lucía José Chloé "
    "René Zoë Søren Jürgen"
)
LAST_NAMES = _words(
    "Smith Johnson Williams Brown Jones Miller Davis Wilson Anderson Taylor Moore Jackson Martin "
    "Lee Thompson White Harris Clark Lewis Walker Hall Young King Wright Green Baker Adams "
    "Nelson Carter Mitchell Turner Parker Evans Edwards Collins Stewart Morris Cook Rogers Reed "
    "Bell Murphy Bailey Cooper Ward Wood Watson Brooks Bennett Gray Hughes Price Myers Foster "
    "Garcia Martinez Lopez Rossi Schmidt Weber Fischer Novak Kowalski Ivanov Tanaka Sato Suzuki "
    "Kim Park Chen Wang Zhang Singh Patel Khan Ali Hansen Nielsen O'Brien Müller García Núñez "
    "Dvořák Lefèvre"
)
JOBS = _words(
    "teacher doctor nurse farmer baker painter writer singer driver pilot lawyer engineer "
    "carpenter gardener cook waiter scientist student soldier sailor fisherman librarian "
    "journalist dentist mechanic tailor shopkeeper musician programmer postman"
)
CITIES = _words(
    "London,Paris,Berlin,Madrid,Rome,Vienna,Prague,Warsaw,Lisbon,Dublin,Oslo,Stockholm,Helsinki,"
    "Copenhagen,Amsterdam,Brussels,Athens,Moscow,Istanbul,Cairo,Tokyo,Kyoto,Seoul,Beijing,"
    "Shanghai,Delhi,Mumbai,Sydney,Toronto,New York,Boston,Chicago,San Francisco,Los Angeles,"
    "Seattle,Mexico City,Buenos Aires,Lima,Nairobi,Zürich,Köln,São Paulo,Málaga,Kraków,Geneva",
    ",",
)
COUNTRIES = _words(
    "England,France,Germany,Spain,Italy,Austria,Poland,Portugal,Ireland,Norway,Sweden,Finland,"
    "Denmark,Greece,Turkey,Egypt,Japan,South Korea,China,India,Australia,Canada,"
    "the United States,Mexico,Brazil,Argentina,Peru,Kenya,Switzerland,Belgium",
    ",",
)
MONTHS = _words(
    "January February March April May June July August September October November December"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
COLOURS = _words("red green blue yellow orange purple black white brown grey pink silver gold")
ANIMALS = _words(
    "dog cat horse cow fox rabbit bird bear lion tiger wolf duck goat pig frog turtle monkey "
    "elephant hen owl squirrel hedgehog snake donkey camel eagle swan spider bee"
)
FOODS = _words(
    "bread,cheese,apples,soup,rice,fish,chicken,cake,chocolate,honey,milk,butter,potatoes,"
    "tomatoes,carrots,onions,pasta,pizza,salad,strawberries,oranges,bananas,eggs,sugar,salt,"
    "ice cream",
    ",",
)
THINGS = _words(
    "book,pen,table,chair,lamp,clock,watch,bag,box,bottle,cup,key,letter,map,phone,computer,"
    "camera,bicycle,car,boat,train ticket,hat,coat,shirt,shoe,umbrella,mirror,picture,guitar,"
    "piano,drum,ball,kite,ring,coin,candle,blanket,pillow,knife,spoon,fork,plate,basket,ladder,"
    "hammer,rope",
    ",",
)
PLACES = _words(
    "garden,forest,village,city,house,kitchen,school,library,market,park,station,river,lake,"
    "mountain,beach,castle,farm,hospital,museum,church,office,shop,bridge,field,cave,harbour,"
    "hotel,theatre",
    ",",
)
ADJECTIVES = _words(
    "old new big small little young beautiful ugly happy sad quick slow brown lazy strange quiet "
    "loud bright dark warm cold heavy light clean dirty rich poor kind clever brave strong weak "
    "empty full long short famous simple difficult important expensive cheap wonderful terrible"
)
ADVERBS = _words(
    "quickly slowly quietly loudly happily sadly carefully suddenly gently bravely politely angrily"
)
VERBS_PAST = _words(
    "found,lost,bought,sold,broke,repaired,painted,opened,closed,saw,dropped,carried,cleaned,"
    "borrowed,forgot,remembered,took,gave away,looked at,put down,picked up,threw away",
    ",",
)
VERBS_ING = _words(
    "walking running sleeping eating singing playing working waiting reading swimming dancing "
    "talking"
)
TIMES_OF_DAY = _words(
    "in the morning,in the evening,at night,at noon,yesterday,last week,last night,two days ago,"
    "every day,after lunch,before dinner,on Monday,on Sunday,in the summer,in the winter",
    ",",
)
WEATHER = _words("sunny rainy cloudy windy cold warm hot foggy snowy beautiful")
TOPICS = _words(
    "music,history,science,art,mathematics,the weather,football,politics,money,love,war,peace,"
    "language,travel,work,school,food,machines,computers,the sea,the stars",
    ",",
)
WORDS_FOR_SITES = _words(
    "python docs library news shop blog wiki garden forest cloud data open free world book music "
    "photo travel food health sport science school maps mail search code test index about help "
    "guide image video user list item home green river stone north star light"
)

CODE_NOUNS = _words(
    "file list string number value key name object function class module token buffer index "
    "result argument parameter iterator sequence dictionary tuple array matrix vector node graph "
    "tree stack queue request response message user path size length output input line model "
    "layer batch timeout cache thread process server client"
)
CODE_TYPES = _words(
    "a list of integers,a list of strings,a string,an integer,a float,a tuple,a dictionary,a set,"
    "a boolean,an array,an iterator,a list,a bytes object,a new object,a copy of the list,None,"
    "a list of tuples,a tensor,a file object,a generator,a pair of integers,a named tuple",
    ",",
)
CODE_SENTENCES = [
    "The function returns {type}.",
    "The function returns {type} of the given {noun}.",
    "The function takes {type} and returns {type2}.",
    "This function returns {type}.",
    "This method returns {type} if the {noun} is found.",
    "Returns {type}.",
    "Return the {noun} of the {noun2}.",
    "Return True if the {noun} is empty, False otherwise.",
    "If the {noun} is not found, a KeyError is raised.",
    "Raises ValueError if the {noun} is not valid.",
    "The {noun} must be {type}.",
    "The default value is {number}.",
    "The {noun} argument is optional and defaults to {number}.",
    "The {noun} is the name of the {noun2}.",
    "The {noun} is {type} that contains the {noun2}.",
    "The first argument is the {noun}, and the second argument is the {noun2}.",
    "If {noun} is None, the {noun2} is used instead.",
    "Create a new {noun} from the given {noun2}.",
    "Convert the {noun} to {type}.",
    "Read the {noun} from the {noun2} and return {type}.",
    "The number of {noun}s in the {noun2}.",
    "This is the {noun} of the {noun2}.",
    "This {noun} is used to store the {noun2}.",
    "Note that the {noun} is not copied.",
    "See the documentation of the {noun} for more information.",
    "An error occurs when the {noun} is larger than the {noun2}.",
    "The language model gives the probability of the next token.",
    "The probability of the next {noun} depends on the {noun2}.",
]

PROVERBS = [
    "An apple a day keeps the doctor away.",
    "An apple a day keeps the doctor away.",
    "The quick brown fox jumps over the lazy dog.",
    "An apple a day keeps the doctor away!",
    "A bird in the hand is worth two in the bush.",
    "Actions speak louder than words.",
    "All that glitters is not gold.",
    "All's well that ends well.",
    "A friend in need is a friend indeed.",
    "A penny saved is a penny earned.",
    "A picture is worth a thousand words.",
    "A rolling stone gathers no moss.",
    "A stitch in time saves nine.",
    "A watched pot never boils.",
    "Absence makes the heart grow fonder.",
    "As you sow, so shall you reap.",
    "Beauty is in the eye of the beholder.",
    "Beggars can't be choosers.",
    "Better late than never.",
    "Better safe than sorry.",
    "Birds of a feather flock together.",
    "Blood is thicker than water.",
    "Curiosity killed the cat.",
    "Don't bite the hand that feeds you.",
    "Don't count your chickens before they hatch.",
    "Don't cry over spilt milk.",
    "Don't judge a book by its cover.",
    "Don't put all your eggs in one basket.",
    "Easy come, easy go.",
    "Every cloud has a silver lining.",
    "Every dog has its day.",
    "Fortune favours the bold.",
    "Good things come to those who wait.",
    "Haste makes waste.",
    "He who laughs last laughs best.",
    "Honesty is the best policy.",
    "If it isn't broken, don't fix it.",
    "If you can't beat them, join them.",
    "It takes two to tango.",
    "It's no use crying over spilt milk.",
    "Knowledge is power.",
    "Laughter is the best medicine.",
    "Let sleeping dogs lie.",
    "Like father, like son.",
    "Look before you leap.",
    "Make hay while the sun shines.",
    "Many hands make light work.",
    "Money doesn't grow on trees.",
    "Necessity is the mother of invention.",
    "No news is good news.",
    "No pain, no gain.",
    "Nothing ventured, nothing gained.",
    "Once bitten, twice shy.",
    "One man's trash is another man's treasure.",
    "Out of sight, out of mind.",
    "Practice makes perfect.",
    "Rome wasn't built in a day.",
    "Slow and steady wins the race.",
    "Still waters run deep.",
    "Strike while the iron is hot.",
    "The best things in life are free.",
    "The early bird catches the worm.",
    "The grass is always greener on the other side of the fence.",
    "The pen is mightier than the sword.",
    "The proof of the pudding is in the eating.",
    "There is no place like home.",
    "There's no smoke without fire.",
    "Time and tide wait for no man.",
    "Time flies.",
    "Time is money.",
    "To be or not to be, that is the question.",
    "Too many cooks spoil the broth.",
    "Two heads are better than one.",
    "Two wrongs don't make a right.",
    "Variety is the spice of life.",
    "When in Rome, do as the Romans do.",
    "When the cat's away, the mice will play.",
    "Where there's a will, there's a way.",
    "You can lead a horse to water, but you can't make it drink.",
    "You can't have your cake and eat it too.",
    "You can't teach an old dog new tricks.",
]
PROVERB_FRAMES = [
    "As the saying goes, {lower}.",
    'My grandmother used to say, "{saying}"',
    '"{saying}" is an old proverb.',
    "{name} always says that {lower}.",
    "Remember: {lower}.",
    'On {day}, {name} wrote "{saying}" on the wall.',
    "They say that {lower}, and {name} agrees.",
    "Proverb: {saying}",
    '"{body}," said {name}.',
    "{saying} That is what {name} told me on {day}.",
    "{body}, they say.",
]
PASSAGES = [
    (
        "It was the best of times, it was the worst of times, it was the age of wisdom, it "
        "was the age of foolishness, it was the epoch of belief, it was the epoch of "
        "incredulity, it was the season of Light, it was the season of Darkness, it was the "
        "spring of hope, it was the winter of despair."
    ),
    (
        "It is a truth universally acknowledged, that a single man in possession of a good "
        "fortune, must be in want of a wife."
    ),
    (
        "Four score and seven years ago our fathers brought forth on this continent, a new "
        "nation, conceived in Liberty, and dedicated to the proposition that all men are "
        "created equal."
    ),
    (
        "We hold these truths to be self-evident, that all men are created equal, that they "
        "are endowed by their Creator with certain unalienable Rights, that among these are "
        "Life, Liberty and the pursuit of Happiness."
    ),
    (
        "Call me Ishmael. Some years ago, never mind how long precisely, having little or no "
        "money in my purse, and nothing particular to interest me on shore, I thought I would "
        "sail about a little and see the watery part of the world."
    ),
    (
        "Alice was beginning to get very tired of sitting by her sister on the bank, and of "
        "having nothing to do: once or twice she had peeped into the book her sister was "
        'reading, but it had no pictures or conversations in it, "and what is the use of a '
        'book," thought Alice, "without pictures or conversations?"'
    ),
    (
        "Twinkle, twinkle, little star,\n"
        "How I wonder what you are!\n"
        "Up above the world so high,\n"
        "Like a diamond in the sky."
    ),
    (
        "Mary had a little lamb,\n"
        "Its fleece was white as snow;\n"
        "And everywhere that Mary went,\n"
        "The lamb was sure to go."
    ),
    (
        "Humpty Dumpty sat on a wall,\n"
        "Humpty Dumpty had a great fall.\n"
        "All the king's horses and all the king's men\n"
        "Couldn't put Humpty together again."
    ),
]

EMOJI_LINES = [
    "Happy birthday, {name}! 🎉🎂",
    "I love {food} 😋",
    "See you at the {place} 👋",
    "Thank you so much, {name}! 🙏❤️",
    "That was so funny 😂😂",
    "Good morning ☀️ {name}",
    "Good night 🌙✨",
    "On my way to the {place} 🚗",
    "Well done, {name} 👏🎉",
    "👍 ok, see you later!",
    "It is raining again ☔😢",
    "🔥🔥🔥 best {food} ever",
    "{name} → {place} ✓",
    "We won! 🏆⚽",
    "🐱 + 🐶 = ❤️",
]

#: language -> sentence shapes; a shape is a list of slots; a slot is a list of strings
FOREIGN: dict[str, list[list[list[str]]]] = {
    "fr": [
        [
            ["Le chat ", "Le garçon ", "La fille ", "Mon frère ", "Ma mère ", "L'élève "],
            ["mange ", "regarde ", "achète ", "préfère ", "a trouvé ", "cherche "],
            ["une pomme", "du pain", "un gâteau", "le château", "la fenêtre", "une forêt"],
            [".", " à l'école.", " près de la rivière.", " aujourd'hui.", " ce matin."],
        ],
        [
            ["Où est ", "Voilà ", "C'est "],
            ["la bibliothèque", "le café", "l'hôtel", "la gare", "le théâtre"],
            [" ?", " de la ville.", ", s'il vous plaît.", ", déjà fermé à cause de la fête."],
        ],
    ],
    "de": [
        [
            ["Der Mann ", "Die Frau ", "Das Mädchen ", "Mein Bruder ", "Die Schülerin "],
            ["kauft ", "findet ", "hört ", "möchte ", "öffnet "],
            ["ein Brötchen", "die Tür", "einen Apfel", "schöne Blumen", "das große Haus"],
            [".", " in München.", " auf der Straße.", " für die Küche.", " am Nachmittag."],
        ],
        [
            ["Guten Morgen", "Schöne Grüße", "Auf Wiedersehen", "Vielen Dank"],
            [", Herr Müller", ", Frau Schäfer", "", " und alles Gute"],
            ["!", "."],
        ],
    ],
    "es": [
        [
            ["El niño ", "La señora ", "Mi hermano ", "El médico ", "Mañana María "],
            ["come ", "compró ", "está mirando ", "quiere ", "encontró "],
            ["una manzana", "el periódico", "la canción", "un árbol", "el corazón de la ciudad"],
            [".", " en España.", " todos los días.", " después de la lección."],
        ],
        [
            ["¿Dónde está ", "¿Cuánto cuesta ", "¡Qué bonito es "],
            ["el jardín", "el café", "el avión", "este país"],
            ["?"],
        ],
    ],
    "pl": [
        [
            ["Mój brat ", "Dziewczyna ", "Książę ", "Pan Wałęsa ", "Źrebię "],
            ["kupuje ", "widzi ", "znalazł ", "lubi "],
            ["jabłko", "książkę", "żółty kwiat", "świeży chleb", "piękną łąkę"],
            [".", " w Łodzi.", " dziś rano.", " i idzie do szkoły."],
        ],
    ],
    "el": [
        [
            ["Ο άνθρωπος ", "Η γυναίκα ", "Το παιδί ", "Ο φίλος μου ", "Ο δάσκαλος "],
            ["βλέπει ", "θέλει ", "αγοράζει ", "διαβάζει ", "έχει "],
            ["ένα βιβλίο", "το σπίτι", "ένα μήλο", "τη θάλασσα", "το ψωμί"],
            [".", " στην Αθήνα.", " σήμερα.", " κάθε μέρα."],
        ],
        [["Καλημέρα", "Καλησπέρα", "Ευχαριστώ πολύ"], [", Μαρία", ", Γιώργο", ""], [".", "!"]],
    ],
    "ru": [
        [
            ["Мой брат ", "Мальчик ", "Девочка ", "Старик ", "Учитель ", "Анна "],
            ["читает ", "видит ", "любит ", "купил ", "нашёл "],
            ["книгу", "яблоко", "хлеб", "большой дом", "новый город", "письмо"],
            [".", " в Москве.", " каждый день.", " утром.", " и идёт домой."],
        ],
        [["Привет", "Доброе утро", "Спасибо", "До свидания"], [", мир", ", друзья", ""], ["!"]],
    ],
    "uk": [
        [
            ["Моя сестра ", "Хлопчик ", "Вчитель "],
            ["читає ", "бачить ", "любить "],
            ["книжку", "яблуко", "хліб", "Київ", "пісню"],
            [".", " щодня.", " у школі."],
        ],
    ],
    "zh": [
        [
            ["我", "他", "她", "我们", "老师", "小明"],
            ["喜欢", "看见", "想要", "买了", "学习"],
            ["苹果", "中文", "一本书", "北京", "茶", "音乐", "米饭"],
            ["。", "！", "，他也是。"],
        ],
        [["你好", "谢谢", "再见", "早上好"], ["，世界", "，朋友", ""], ["！", "。"]],
        [["今天", "明天", "昨天"], ["天气", "我的工作", "这里"], ["很好", "不好", "很忙"], ["。"]],
    ],
    "ja": [
        [
            ["私は", "彼は", "田中さんは", "母は", "猫は"],
            ["本を", "水を", "りんごを", "日本語を", "テレビを"],
            ["読みます", "買いました", "見ています", "好きです"],
            ["。"],
        ],
        [
            ["こんにちは", "おはようございます", "ありがとうございます"],
            ["、世界", ""],
            ["。", "！"],
        ],
        [
            ["東京", "京都", "コーヒー", "ラーメン"],
            ["は", "が"],
            ["とても"],
            ["いいです。", "好きです。"],
        ],
    ],
    "ko": [
        [
            ["나는 ", "그는 ", "선생님은 ", "친구는 "],
            ["책을 ", "사과를 ", "물을 ", "한국어를 "],
            ["읽습니다", "좋아합니다", "샀습니다", "배웁니다"],
            ["."],
        ],
        [["안녕하세요", "감사합니다"], ["", ", 여러분"], [".", "!"]],
    ],
    "ar": [
        [
            ["الولد ", "البنت ", "المعلم ", "صديقي "],
            ["يقرأ ", "يحب ", "يرى "],
            ["الكتاب", "التفاح", "المدينة", "البحر"],
            [".", " كل يوم."],
        ],
    ],
    "hi": [
        [
            ["मैं ", "राम ", "मेरा दोस्त "],
            ["किताब ", "सेब ", "पानी ", "चाय "],
            ["चाहता है", "देखता है", "लाता है"],
            ["।"],
        ],
    ],
    "math": [
        [
            ["For all ", "∀ ", "Let "],
            ["x ∈ ℝ", "α ≥ 0", "n ∈ ℕ", "ε > 0", "θ ≠ π/2"],
            [": ", ", ", " ⇒ "],
            ["x² ≥ 0", "∑ aₙ ≤ ∞", "√2 ≈ 1.414", "∫ f(x) dx = 1", "λ·μ ± σ", "A ∪ B ⊂ C"],
            [".", ""],
        ],
        [
            ["The temperature is ", "It measured ", "We set it to "],
            ["20", "36.6", "−5", "100"],
            [" °C", " µm", " kΩ", " ± 0.5 °"],
            [".", " today.", " — as expected."],
        ],
        [
            ["He said “", "“", "She whispered, “", "«"],
            ["naïve", "café", "it’s fine", "I don’t know", "déjà vu", "coöperate"],
            ["” — ", "”… ", "” and "],
            ["nothing more", "then left", "© 2020", "§ 3", "that’s all", "½ of it"],
            ["."],
        ],
    ],
}
