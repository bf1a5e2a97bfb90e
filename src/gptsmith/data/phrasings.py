"""Ways to ask what the built-in chat set answers, and the answers that never change."""

from __future__ import annotations

from typing import NamedTuple


class Phrasings(NamedTuple):
    """Ways to ask or say something: those of training, and those that only tests use."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...]


# fmt: off
PHRASINGS = {
    # skills
    "copy": Phrasings(
        ("Repeat {x}.", "Say {x}.", "Copy this: {x}", "Repeat after me: {x}", "Write {x} again.",
         'Say "{x}".', "Repeat this: {x}"),
        ("Please say {x} again.", "Can you repeat {x}?", "Say this after me: {x}"),
    ),
    "reverse": Phrasings(
        ("Reverse {x}.", "Spell {x} backwards.", "Write {x} backwards.", "What is {x} backwards?",
         "Reverse the word {x}.", 'Reverse "{x}".', "Write the letters of {x} in reverse."),
        ("How do you spell {x} backwards?", "Reverse this: {x}", "Say {x} in reverse."),
    ),
    "uppercase": Phrasings(
        ("Uppercase {x}.", "Write {x} in capitals.", "Write {x} in upper case.",
         "Make {x} upper case.", "What is {x} in capital letters?", 'Put "{x}" in capitals.',
         "Uppercase the word {x}."),
        ("How do you write {x} in capitals?", "Spell {x} in upper case.", "Uppercase this: {x}"),
    ),
    "count": Phrasings(
        ("How many {c} are in {x}?", "How many times does {c} occur in {x}?",
         "Count the letter {c} in {x}.", "How often is {c} in {x}?",
         "How many {c}'s does {x} have?", 'How many "{c}" are in "{x}"?'),
        ("How often does {c} occur in {x}?", "Count the {c}'s in {x}.", "In {x}, how many {c}?"),
    ),
    "length": Phrasings(
        ("How long is {x}?", "How many letters does {x} have?", "How many letters are in {x}?",
         "Count the letters of {x}.", "What is the length of {x}?", 'How long is "{x}"?'),
        ("How long is the word {x}?", "Count all letters in {x}.", "The length of {x}?"),
    ),
    "add": Phrasings(
        ("What is {a} + {b}?", "What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b} =",
         "How much is {a} + {b}?", "{a} plus {b}", "What is the sum of {a} and {b}?"),
        ("Add {a} to {b}.", "How much is {a} plus {b}?", "The sum of {a} and {b}?"),
    ),
    "larger": Phrasings(
        ("Which is larger, {a} or {b}?", "What is larger: {a} or {b}?",
         "Which number is larger, {a} or {b}?", "Name the larger of {a} and {b}."),
        ("Which of {a} and {b} is larger?", "{a} or {b}, which is larger?"),
    ),
    "smaller": Phrasings(
        ("Which is smaller, {a} or {b}?", "What is smaller: {a} or {b}?",
         "Which number is smaller, {a} or {b}?", "Name the smaller of {a} and {b}."),
        ("Which of {a} and {b} is smaller?", "{a} or {b}, which is smaller?"),
    ),
    "greet": Phrasings(
        ("My name is {n}.", "I am {n}.", "I'm {n}.", "Hello, I am {n}.", "Hi, my name is {n}.",
         "Call me {n}."),
        ("Hello, call me {n}.", "Hi! I'm {n}.", "The name is {n}."),
    ),
    "name": Phrasings(
        ("What is my name?", "Who am I?", "What am I called?", "Do you know my name?",
         "Say my name."),
        ("Do you know who I am?", "Tell me: what is my name?", "And my name is?"),
    ),
    # facts about Python
    "functions": Phrasings(
        ("What does {f} do?", "Explain {f}.", "What is {f} for?", "Describe {f}."),
        ("Tell me what {f} does.", "What is {f}?", "{f}?"),
    ),
    "modules": Phrasings(
        ("What does the {f} module do?", "What is the {f} module?", "Explain the module {f}.",
         "What is {f} for?", "What does the module {f} do?", "What does {f} do?"),
        ("Tell me what the {f} module does.", "Describe the {f} module.",
         "What is the module {f} for?"),
    ),
    # everyday turns
    "greeting": Phrasings(
        ("Hello.", "Hello!", "Hi.", "Hi!", "Hi there.", "Hey.", "Good morning.", "Good morning!",
         "Good evening.", "Hello there!", "Good day."),
        ("Hi there!", "Good afternoon.", "Hello again.", "Hey there!"),
    ),
    "identity": Phrasings(
        ("Who are you?", "What are you?", "What is your name?", "Are you human?",
         "Are you a robot?", "Tell me about yourself.", "Introduce yourself.", "Who made you?",
         "Do you have a name?", "What kind of model are you?", "Are you ChatGPT?"),
        ("And who are you?", "What kind of program are you?", "Are you a person?",
         "Say who you are.", "Who am I talking to?"),
    ),
    "abilities": Phrasings(
        ("What can you do?", "How can you help me?", "Help.", "Help me.", "What do you know?",
         "What are you good at?", "Can you help me?", "What can I ask you?",
         "What are your skills?", "What should I ask you?"),
        ("What else can you do?", "How can you help?", "Tell me what you can do.",
         "What can I do with you?"),
    ),
    "wellbeing": Phrasings(
        ("How are you?", "How are you today?", "How is it going?", "Are you well?",
         "How do you do?", "How do you feel?", "Hello, how are you?", "What's up?"),
        ("And how are you?", "How are you doing?", "How are things?", "Are you okay?"),
    ),
    "thanks": Phrasings(
        ("Thanks.", "Thank you.", "Thanks!", "Thank you!", "Thank you very much.",
         "Thanks a lot.", "Great, thanks.", "Thank you for the answer."),
        ("Many thanks.", "Thank you so much!", "Thanks for your help.", "Perfect, thank you."),
    ),
    "goodbye": Phrasings(
        ("Goodbye.", "Goodbye!", "Bye.", "Bye!", "See you.", "See you later.", "Good night.",
         "Bye bye.", "I have to go."),
        ("Goodbye then!", "See you soon.", "Bye for now.", "See you tomorrow."),
    ),
    "praise": Phrasings(
        ("Ok.", "Okay.", "Good.", "Great.", "Very good.", "Right.", "That is right.", "Yes.",
         "Well done.", "Nice.", "Good answer."),
        ("Great!", "Very nice.", "Okay then.", "Yes, right."),
    ),
    "doubt": Phrasings(
        ("No.", "Wrong.", "That is wrong.", "That is not right.", "Are you sure?",
         "You are wrong.", "No, that is wrong.", "Really?", "I do not believe you."),
        ("This is wrong.", "No, wrong.", "Are you really sure?", "That is not correct."),
    ),
    "unknown": Phrasings(
        ("What is the capital of {place}?", "Where is {place}?", "What is the weather in {place}?",
         "How many people live in {place}?", "Tell me about {place}.", "Have you been to {place}?",
         "Write a poem about {thing}.", "Tell me a story about {thing}.", "What is {thing}?",
         "Why do people like {thing}?", "What do you think about {thing}?", "Do you like {thing}?",
         "Who invented {thing}?", "Where can I buy {thing}?", "Write an essay about {thing}.",
         "Translate {x} into German.", "What does the word {x} mean?", "What rhymes with {x}?",
         "Use {x} in a sentence.", "Is {x} a verb?",
         "What is {a} times {b}?", "What is {a} minus {b}?", "{a} * {b} =", "{a} - {b} =",
         "Multiply {a} and {b}.", "What is {a} - {b}?", "What is {a} * {b}?",
         "Who is {n}?", "How old is {n}?", "Where does {n} live?",
         "What time is it?", "What day is it today?", "Tell me a joke.", "Sing a song.",
         "What is the meaning of life?", "Who is the president?", "Why is the sky blue?",
         "What is the weather today?", "Do my homework.", "Write a program.", "What is the news?",
         "How do I sort a list?", "How do I open a file?", "Write a poem.", "Play some music.",
         "How far is the moon?", "Who won the game?", "What should I eat?", "Fix my code."),
        ("Which language do they speak in {place}?", "How big is {place}?",
         "Write a song about {thing}.", "What colour is {thing}?", "How do you make {thing}?",
         "Translate {x} into French.", "What is the opposite of {x}?",
         "Divide {a} by {b}.", "Subtract {a} from {b}.", "When was {n} born?",
         "How is the weather today?", "What year is it?", "Tell me a story.",
         "How do I write a loop?", "Who wrote the Bible?", "How tall is a tree?"),
    ),
}

ANSWERS = {
    "greeting": "Hello! What can I do for you?",
    "identity": "I am a small language model, trained with gptsmith.",
    "abilities": "I can spell, count, add and compare, and explain a little Python.",
    "wellbeing": "I am a program, and I run well.",
    "thanks": "You are welcome.",
    "goodbye": "Goodbye!",
    "praise": "Good! What next?",
    "doubt": "I may be wrong: I make mistakes.",
    "unknown": "I do not know that. I can spell, count, add and compare.",
    "no name": "You have not told me your name.",
}

PLACES = [
    "Africa", "Argentina", "Athens", "Australia", "Austria", "Berlin", "Boston", "Brazil", "Cairo",
    "Canada", "Chicago", "Chile", "China", "Cuba", "Delhi", "Denmark", "Dublin", "Egypt", "England",
    "Europe", "Finland", "France", "Germany", "Ghana", "Greece", "Hungary", "Iceland", "India",
    "Iran", "Ireland", "Israel", "Italy", "Japan", "Kenya", "Lima", "Lisbon", "London", "Madrid",
    "Mexico", "Moscow", "Mumbai", "Nepal", "Nigeria", "Norway", "Oslo", "Paris", "Peru", "Poland",
    "Portugal", "Prague", "Rome", "Russia", "Seoul", "Spain", "Sweden", "Texas", "Tokyo", "Turkey",
    "Ukraine", "Vienna", "Warsaw",
]
THINGS = [
    "apples", "art", "beer", "birds", "books", "bread", "butter", "cars", "cats", "cheese", "chess",
    "children", "chocolate", "cities", "clouds", "coffee", "computers", "dogs", "dreams", "films",
    "fire", "fish", "flowers", "football", "friends", "fruit", "games", "gardens", "gold",
    "happiness", "history", "horses", "houses", "jazz", "letters", "love", "medicine", "milk",
    "money", "mountains", "music", "paper", "peace", "physics", "pizza", "planets", "poetry",
    "rain", "rice", "rivers", "roses", "salt", "school", "ships", "snow", "soup", "space", "spring",
    "summer", "tea", "television", "time", "trains", "trees", "war", "water", "wine", "winter",
]
# fmt: on
