// Examples: what stands in the fields at first, so that the first click shows something.

export const ALIKE = [
  "The moon pulls the sea towards it.",
  "Tides rise and fall twice a day.",
  "Lunar gravity moves the oceans.",
  "Yeast makes bread rise.",
  "A sourdough starter is flour and water.",
  "Knead the dough for ten minutes.",
  "Share prices fell on Monday.",
  "The market lost two per cent this week.",
];

export const QUESTION = "Why are there tides?";
export const PASSAGES = [
  "Yeast eats sugar and gives off gas, which makes bread rise.",
  "The moon pulls the sea towards it, and the earth turns below.",
  "Twice a day the water comes up the beach and goes away again.",
  "Harbours publish tables of high and low water for the year.",
  "The central bank left its rate unchanged.",
  "Neap tides are weak, since sun and moon pull at right angles.",
];

export const WHEN = "When was the old bridge built?";
export const BRIDGES = [
  "The stone bridge was finished in 1357, after a flood had taken the one before it.",
  "Trains cross the river every ten minutes.",
  "Engineers inspect the bridge each spring.",
];

export const PEOPLE = [
  "Marie Curie was born in Warsaw and worked in Paris.",
  "Ada Lovelace wrote to Charles Babbage from London in 1843.",
  "The United Nations moved its office from Geneva to Nairobi.",
];

export const KINDS = ["person", "place", "organisation", "date"];

export const MOODS = [
  "What a fine day.",
  "I have waited for two hours, and nobody answers the phone.",
  "The parcel came on Tuesday.",
];

export const TONES = ["complaint", "praise", "news"];

export const SPARSE = ["Why are there tides?", "The moon pulls the sea towards it."];

export const TOPICS = [
  ...ALIKE,
  "The harbour is dry at low water.",
  "A full moon brings a spring tide.",
  "Waves are made by wind, not by the moon.",
  "The oven must be hot before the loaf goes in.",
  "Rye bread keeps for a week.",
  "Salt slows the yeast down.",
  "Investors moved their money into bonds.",
  "The currency gained against the dollar.",
  "The company paid no dividend.",
  "The violin is tuned in fifths.",
  "She practises scales on the piano.",
  "The choir sings in four parts.",
  "A minor key sounds sad to many.",
  "The drummer keeps the time.",
];

/** Pages drawn here, for models that read pictures: a chart, an invoice, a recipe. */
export function pages() {
  return [
    drawn("rain.png", (paper) => {
      paper.title("Rainfall by month, mm");
      const months = "JFMAMJJASOND", rain = [62, 48, 51, 40, 55, 71, 84, 78, 60, 66, 90, 74];
      rain.forEach((value, index) => {
        paper.box(46 + index * 33, 470 - value * 3.6, 22, value * 3.6, index === 10 ? "#0e7c86" : "#9cc4c8");
        paper.write(months[index], 52 + index * 33, 494, 16);
        paper.write(String(value), 47 + index * 33, 462 - value * 3.6, 13);
      });
      paper.write("November is the wettest month.", 46, 560, 20);
    }),
    drawn("invoice.png", (paper) => {
      paper.title("Invoice 2041");
      [["Bread, 12 loaves", "36.00"], ["Butter, 3 kg", "27.60"], ["Delivery", "5.00"]].forEach(([what, price], row) => {
        paper.write(what, 46, 160 + row * 44, 20);
        paper.write(price, 360, 160 + row * 44, 20);
        paper.box(46, 174 + row * 44, 388, 1, "#c4c9c8");
      });
      paper.write("Total", 46, 320, 24);
      paper.write("68.60", 354, 320, 24);
      paper.write("To be paid by 14 March.", 46, 400, 18);
    }),
    drawn("recipe.png", (paper) => {
      paper.title("Rye bread");
      ["500 g rye flour", "350 ml water", "10 g salt", "100 g sourdough"].forEach((line, row) => paper.write(`– ${line}`, 46, 160 + row * 36, 20));
      paper.write("Bake at 220 °C for 50 minutes.", 46, 360, 20);
      paper.box(150, 420, 180, 110, "#b98a54");
      paper.box(150, 410, 180, 24, "#8f6535");
    }),
  ];
}

function drawn(name, draw) {
  const canvas = Object.assign(document.createElement("canvas"), { width: 480, height: 640 });
  const context = canvas.getContext("2d");
  const paper = {
    box(x, y, width, height, color) { context.fillStyle = color; context.fillRect(x, y, width, height); },
    write(text, x, y, size) { context.fillStyle = "#1c2426"; context.font = `${size}px system-ui, sans-serif`; context.fillText(text, x, y); },
    title(text) { this.write(text, 46, 90, 32); },
  };
  paper.box(0, 0, 480, 640, "#ffffff");
  draw(paper);
  return { name, uri: canvas.toDataURL("image/png") };
}
